"""The object file that holds a library's constants and virtual machine code: one symbol, written directly.

TVM makes it with LLVM, which takes more time for 76 MB of weights than for the code that uses them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from toolchain.tvm.elf import MACHINES

SYMBOL = "__tvm_ffi__library_bin"
"""Under this name TVM's runtime looks for the bytes when it opens a library."""

_SECTIONS = ("", ".rodata", ".note.GNU-stack", ".symtab", ".strtab")
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC = 2
_GLOBAL_OBJECT = 0x11
_FLAGS = {"armv7l": 0x05000000, "riscv64": 0x5}
"""e_flags, which linkers compare: version 5 of the ARM EABI ("ELF for the Arm Architecture"); compressed instructions
and the calling convention with doubles in registers (RISC-V ELF psABI, "File Header")."""


@dataclass(frozen=True, slots=True)
class _Class:
    """What the two widths of ELF files write differently: sizes of the parts, and their fields for ``struct``."""

    ident: int
    header: str
    section: str
    symbol: str
    align: int


_ELF64 = _Class(2, "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ", "<IBBHQQ", 8)
_ELF32 = _Class(1, "<16sHHIIIIIHHHHHH", "<IIIIIIIIII", "<IIIBBH", 4)


def write_object(data: memoryview, arch: str, path: Path, symbol: str = SYMBOL, alignment: int = 16) -> None:
    """Writes a relocatable ELF file whose only symbol names ``data`` in ``.rodata``.

    The format is the System V ABI's, "Object Files"; the same input gives the same bytes.

    Args:
        data: contiguous bytes.
        arch: a value of :data:`toolchain.tvm.elf.MACHINES`, for the header.
        path: the file to write.
        symbol: the symbol's name.
        alignment: of its address, in bytes; a power of two.
    """
    machine = next(number for number, name in MACHINES.items() if name == arch)
    elf = _ELF32 if arch == "armv7l" else _ELF64
    names = b"".join(name.encode() + b"\0" for name in (*_SECTIONS, symbol))
    offset_of = [names.index(name.encode() + b"\0") for name in (*_SECTIONS, symbol)]
    entry, symbols = struct.calcsize(elf.section), _symbols(elf, offset_of[-1], data.nbytes)
    header_size = struct.calcsize(elf.header)
    start = -(-header_size // alignment) * alignment
    padding = -data.nbytes % 8
    symbols_at = start + data.nbytes + padding
    names_at = symbols_at + len(symbols)
    table_at = names_at + len(names) + -len(names) % 8

    def section(name: int, kind: int, flags: int, offset: int, size: int, link: int, info: int, *rest: int) -> bytes:
        return struct.pack(elf.section, name, kind, flags, 0, offset, size, link, info, *rest)

    sections = [
        bytes(entry),
        section(offset_of[1], _PROGBITS, _ALLOC, start, data.nbytes, 0, 0, alignment, 0),
        section(offset_of[2], _PROGBITS, 0, symbols_at, 0, 0, 0, 1, 0),
        section(offset_of[3], _SYMTAB, 0, symbols_at, len(symbols), 4, 1, elf.align, len(symbols) // 2),
        section(offset_of[4], _STRTAB, 0, names_at, len(names), 0, 0, 1, 0),
    ]
    identity, flags = b"\x7fELF" + bytes([elf.ident, 1, 1]) + bytes(9), _FLAGS.get(arch, 0)
    header = struct.pack(
        elf.header, identity, 1, machine, 1, 0, 0, table_at, flags, header_size, 0, 0, entry, len(sections), 4
    )
    with open(path, "wb") as file:
        file.write(header.ljust(start, b"\0"))
        file.write(data)
        file.write(bytes(padding) + symbols + names + bytes(-len(names) % 8) + b"".join(sections))


def _symbols(elf: _Class, name: int, size: int) -> bytes:
    """The symbol table: the empty first entry, and the data's."""
    if elf is _ELF64:
        entry = struct.pack(elf.symbol, name, _GLOBAL_OBJECT, 0, 1, 0, size)
    else:
        entry = struct.pack(elf.symbol, name, 0, size, _GLOBAL_OBJECT, 0, 1)
    return bytes(len(entry)) + entry
