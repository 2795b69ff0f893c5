"""The check of a shared library that the dynamic loader does not make."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from toolchain.bundle.check import damaged


def check_library(path: Path) -> None:
    """Refuse what the dynamic loader would crash on: it maps a truncated library and dies of SIGBUS.

    The offsets are those of ``Elf64_Ehdr`` (System V gABI, "ELF Header"); the section table lies at the file's end.

    Raises:
        ToolchainError: DAMAGED_BUNDLE.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        raise damaged("is not a shared library (64-bit little-endian ELF)", path.name)
    sections = int.from_bytes(header[40:48], "little")
    entry, count = struct.unpack("<HH", header[58:62])
    if sections + entry * count > size:
        raise damaged(f"is truncated: it has {size} bytes, at least {sections + entry * count} are needed", path.name)
