"""The object file of a library's constants."""

import ctypes
import platform
from pathlib import Path

import pytest

from toolchain.tvm.blob import SYMBOL, write_object
from toolchain.tvm.elf import read_elf
from toolchain.tvm.link import Linker

DATA = bytes(range(256)) * 33 + b"odd"


@pytest.mark.parametrize("linker", ["cc", "zig"])
def test_a_library_linked_with_the_object_holds_the_bytes(linker: str, tmp_path: Path) -> None:
    arch = platform.machine()
    write_object(memoryview(DATA), arch, tmp_path / "constants.o")
    Linker(linker, arch, "").link(["constants.o"], tmp_path)
    library = ctypes.CDLL(str(tmp_path / "model.so"))
    held = (ctypes.c_char * len(DATA)).in_dll(library, SYMBOL)
    assert bytes(held) == DATA
    assert ctypes.addressof(held) % 16 == 0


def test_an_object_for_another_architecture_links_for_it(tmp_path: Path) -> None:
    write_object(memoryview(DATA), "aarch64", tmp_path / "constants.o")
    assert read_elf(tmp_path / "constants.o").machine == "aarch64"
    Linker("zig", "aarch64", "").link(["constants.o"], tmp_path)
    assert read_elf(tmp_path / "model.so").machine == "aarch64"
    assert DATA in (tmp_path / "model.so").read_bytes()


def test_the_object_does_not_ask_for_an_executable_stack(tmp_path: Path) -> None:
    write_object(memoryview(b""), "x86_64", tmp_path / "constants.o")
    assert ".note.GNU-stack" in read_elf(tmp_path / "constants.o").sections


@pytest.mark.parametrize("arch", ["armv7l", "riscv64"])
def test_an_object_links_with_compiled_code_of_architectures_whose_flags_must_agree(arch: str, tmp_path: Path) -> None:
    write_object(memoryview(DATA), arch, tmp_path / "constants.o", "held", 64)
    (tmp_path / "reader.c").write_text("extern const char held[];\ndouble first(double x) { return x + held[0]; }\n")
    linker = Linker("zig-cc", arch, "")
    linker.compile("reader.c", tmp_path)
    linker.link(["constants.o", "reader.o"], tmp_path)
    made = read_elf(tmp_path / "model.so")
    assert made.machine == read_elf(tmp_path / "constants.o").machine == arch
    assert "held" not in made.undefined
    assert ".dynsym" in made.sections
    assert DATA in (tmp_path / "model.so").read_bytes()
