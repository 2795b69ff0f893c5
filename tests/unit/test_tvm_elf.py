"""Reading shared libraries and calling linkers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.elf import ElfInfo, glibc_newer_than, read_elf
from toolchain.tvm.link import Linker

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not on PATH")


@needs_cc
def test_needed_undefined_and_versions_are_those_of_the_library(tmp_path: Path) -> None:
    code = "#include <math.h>\ndouble f(double x) { return pow(x, 2.5) + cos(x); }\n"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", "f.so", "-lm"]
    subprocess.run(command, input=code, text=True, cwd=tmp_path, check=True)
    info = read_elf(tmp_path / "f.so")
    assert info.machine == platform.machine()
    assert "libm.so.6" in info.needed
    assert {"cos", "pow"} <= set(info.undefined)
    assert "GLIBC_2.29" in info.versions
    assert ".text" in info.sections
    assert "GLIBC_2.29" in glibc_newer_than(info, "2.28")


def test_versions_are_compared_as_numbers() -> None:
    info = ElfInfo("x86_64", (), (), ("GLIBC_2.2.5", "GLIBC_2.14", "GLIBC_2.29", "GLIBC_PRIVATE"), ())
    assert glibc_newer_than(info, "2.9") == ["GLIBC_2.14", "GLIBC_2.29"]
    assert glibc_newer_than(info, "2.29") == []


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match="a is not a little-endian ELF file"):
        read_elf(tmp_path / "a")


def test_a_misspelt_zig_linker_is_not_replaced_by_another() -> None:
    with pytest.raises(ToolchainError, match="got linker 'zigcc'; allowed: cc, zig, zig-cc") as caught:
        Linker("zigcc", "aarch64", "2.28").check()
    assert caught.value.code == ExitCode.COMPILE


def test_a_missing_cross_compiler_says_which_package_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError) as caught:
        Linker("aarch64-linux-gnu-gcc", "aarch64", "").check()
    assert caught.value.code == ExitCode.MISSING_TOOL
    assert caught.value.hint == "apt-get install gcc-aarch64-linux-gnu"


@needs_cc
def test_a_linker_failure_shows_the_linkers_message(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_text("not an object")
    with pytest.raises(ToolchainError, match="linker 'cc' failed with status 1") as caught:
        Linker("cc", platform.machine(), "").link(["broken.o"], tmp_path)
    assert caught.value.code == ExitCode.COMPILE
    assert any("broken.o" in line for line in caught.value.details)
