"""The object file that holds a library's constants and virtual machine code: one symbol, written directly.

TVM makes it with LLVM, which takes more time for 76 MB of weights than for the code that uses them.
"""

from __future__ import annotations

import struct
from pathlib import Path

from toolchain.tvm.elf import MACHINES

SYMBOL = "__tvm_ffi__library_bin"
"""Under this name TVM's runtime looks for the bytes when it opens a library."""

_SECTIONS = ("", ".rodata", ".note.GNU-stack", ".symtab", ".strtab")
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC = 2
_GLOBAL_OBJECT = 0x11
_HEADER, _ENTRY, _SYMBOL_SIZE = 64, 64, 24


def write_object(data: memoryview, arch: str, path: Path, symbol: str = SYMBOL, alignment: int = 16) -> None:
    """Writes a relocatable ELF file whose only symbol names ``data`` in ``.rodata``.

    The format is the System V ABI's, "Object Files"; the same input gives the same bytes.

    Args:
        data: contiguous bytes.
        arch: ``"x86_64"`` or ``"aarch64"``, for the header.
        path: the file to write.
        symbol: the symbol's name.
        alignment: of its address, in bytes; a power of two.
    """
    machine = next(number for number, name in MACHINES.items() if name == arch)
    names = b"".join(name.encode() + b"\0" for name in (*_SECTIONS, symbol))
    offset_of = [names.index(name.encode() + b"\0") for name in (*_SECTIONS, symbol)]
    symbols = bytes(_SYMBOL_SIZE) + struct.pack("<IBBHQQ", offset_of[-1], _GLOBAL_OBJECT, 0, 1, 0, data.nbytes)
    start = -(-_HEADER // alignment) * alignment
    padding = -data.nbytes % 8
    symbols_at = start + data.nbytes + padding
    names_at = symbols_at + len(symbols)
    table_at = names_at + len(names) + -len(names) % 8
    sections = [
        bytes(_ENTRY),
        _section(offset_of[1], _PROGBITS, _ALLOC, start, data.nbytes, 0, 0, alignment, 0),
        _section(offset_of[2], _PROGBITS, 0, symbols_at, 0, 0, 0, 1, 0),
        _section(offset_of[3], _SYMTAB, 0, symbols_at, len(symbols), 4, 1, 8, _SYMBOL_SIZE),
        _section(offset_of[4], _STRTAB, 0, names_at, len(names), 0, 0, 1, 0),
    ]
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", identity, 1, machine, 1, 0, 0, table_at, 0, _HEADER, 0, 0, _ENTRY, len(sections), 4
    )
    with open(path, "wb") as file:
        file.write(header.ljust(start, b"\0"))
        file.write(data)
        file.write(bytes(padding) + symbols + names + bytes(-len(names) % 8) + b"".join(sections))


def _section(
    name: int, kind: int, flags: int, offset: int, size: int, link: int, info: int, align: int, entry: int
) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, link, info, align, entry)
