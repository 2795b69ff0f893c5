"""The little of ELF that a release must know of a shared library: machine, what it needs and leaves undefined."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MACHINES = {40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""e_machine -> architecture name."""

_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERNEED = 6, 11, 0x6FFFFFFE
_DT_NEEDED = 1


@dataclass(frozen=True, slots=True)
class ElfInfo:
    """Facts of one shared library.

    Attributes:
        machine: a value of :data:`MACHINES`, or ``"machine N"``.
        needed: names of the libraries it loads (DT_NEEDED).
        undefined: names of the symbols it takes from elsewhere, sorted.
        versions: symbol versions it demands, e.g. ``"GLIBC_2.14"``, sorted.
        sections: section names in order.
    """

    machine: str
    needed: tuple[str, ...]
    undefined: tuple[str, ...]
    versions: tuple[str, ...]
    sections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a file of one width has what: the section table's offset and its counts, and the fields of entries."""

    table: str
    table_at: int
    counts_at: int
    section: str
    dynamic: str
    symbol: str
    symbol_section: int


_LAYOUTS = {
    1: _Layout("<I", 32, 46, "<IIIIIII", "<II", "<IIIBBH", 5),
    2: _Layout("<Q", 40, 58, "<IIQQQQI", "<QQ", "<IBBHQQ", 3),
}


@dataclass(frozen=True, slots=True)
class _Section:
    name: int
    kind: int
    offset: int
    size: int
    link: int


def read_elf(path: Path) -> ElfInfo:
    """Reads a little-endian ELF file (the System V ABI's "Object Files" chapter); never its code or data.

    Raises:
        ValueError: not such a file.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:4] != b"\x7fELF" or header[4] not in _LAYOUTS or header[5] != 1:
            raise ValueError(f"{path.name} is not a little-endian ELF file")
        machine, layout = struct.unpack_from("<H", header, 18)[0], _LAYOUTS[header[4]]
        (table,) = struct.unpack_from(layout.table, header, layout.table_at)
        entry, count, names_at = struct.unpack_from("<HHH", header, layout.counts_at)
        sections = [_section(_at(file, table + i * entry, entry), layout) for i in range(count)]
        names = _content(file, sections[names_at])
        needed: list[str] = []
        undefined: set[str] = set()
        versions: set[str] = set()
        for section in sections:
            if section.kind not in (_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERNEED):
                continue
            data, strings = _content(file, section), _content(file, sections[section.link])
            if section.kind == _SHT_DYNAMIC:
                entries = struct.iter_unpack(layout.dynamic, data)
                needed += [_text(strings, value) for tag, value in entries if tag == _DT_NEEDED]
            elif section.kind == _SHT_DYNSYM:
                symbols = struct.iter_unpack(layout.symbol, data)
                undefined |= {_text(strings, s[0]) for s in symbols if s[layout.symbol_section] == 0 and s[0]}
            else:
                versions |= _needed_versions(data, strings)
    return ElfInfo(
        MACHINES.get(machine, f"machine {machine}"),
        tuple(needed),
        tuple(sorted(undefined)),
        tuple(sorted(versions)),
        tuple(_text(names, section.name) for section in sections),
    )


def glibc_newer_than(info: ElfInfo, minimum: str) -> list[str]:
    """The demanded ``GLIBC_x.y`` versions above ``minimum`` (``"2.28"``)."""
    limit = _version(minimum)
    found = [v for v in info.versions if v.startswith("GLIBC_") and v[6:7].isdigit()]
    return [v for v in found if _version(v[6:]) > limit]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _section(data: bytes, layout: _Layout) -> _Section:
    name, kind, _, _, offset, size, link = struct.unpack_from(layout.section, data)
    return _Section(name, kind, offset, size, link)


def _content(file: BinaryIO, section: _Section) -> bytes:
    return _at(file, section.offset, section.size)


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _needed_versions(data: bytes, strings: bytes) -> set[str]:
    found, at = set(), 0
    while True:
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        item = at + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, item)
            found.add(_text(strings, name))
            item += step
        if not following:
            return found
        at += following
