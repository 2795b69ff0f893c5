"""Versions of compilers and linkers: asked once, part of the key, named when they change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toolchain.keys import describe_difference, key_components
from toolchain.programs import program_version
from toolchain.stage import Node
from toolchain.stages import compile_ort, compile_tvm

NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Wed_Aug_20_01:58:59_PM_PDT_2025
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, but for the shell and cat."""
    made = tmp_path / "bin"
    made.mkdir()
    (made / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(made))
    return made


def install(folder: Path, name: str, told: str, status: int = 0) -> Path:
    """A program that says ``told`` and notes each call in NAME.calls."""
    (folder / f"{name}.txt").write_text(told)
    program = folder / name
    lines = ["#!/bin/sh", f"echo $* >> {folder}/{name}.calls", f"cat {folder}/{name}.txt", f"exit {status}", ""]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    return program


def calls(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.calls").read_text().splitlines()


def test_a_programs_version_is_the_line_that_names_it(folder: Path) -> None:
    install(folder, "nvcc", NVCC)
    install(folder, "cc", "cc (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022\n")
    assert program_version("nvcc") == "Cuda compilation tools, release 13.0, V13.0.88"
    assert program_version("cc") == "cc (Debian 12.2.0-14) 12.2.0"
    assert program_version("clang") == "not installed"


def test_a_program_is_asked_again_only_when_its_file_has_changed(folder: Path) -> None:
    program = install(folder, "cc", "cc 12.2\n")
    assert [program_version("cc") for _ in range(3)] == ["cc 12.2"] * 3
    assert calls(folder, "cc") == ["--version"]
    install(folder, "cc", "cc 13.1\n")
    os.utime(program, (2_000_000_000, 2_000_000_000))
    assert program_version("cc") == "cc 13.1"
    assert len(calls(folder, "cc")) == 2


@pytest.mark.parametrize(("told", "status"), [("cc 12.2\n", 1), ("a compiler\n", 0), ("", 0)])
def test_a_program_that_names_no_version_is_known_by_its_file(folder: Path, told: str, status: int) -> None:
    program = install(folder, "cc", told, status)
    os.utime(program, ns=(1, 17))
    first = program_version("cc")
    assert first == f"unknown ({program.stat().st_size} bytes, modified 17)"
    os.utime(program, ns=(1, 18))
    assert program_version("cc") != first


def options(kind: str = "cpu", arch: str = "x86_64", native: bool = True, linker: str = "cc") -> compile_tvm.Options:
    return compile_tvm.Options({"kind": "llvm"}, kind, arch, native, 256, 16, linker, "", "fp32")


@pytest.mark.parametrize(
    ("given", "programs"),
    [
        (options(), ("cc", "ld")),
        (options(linker="zig"), ()),
        (options(linker="zig-cc"), ()),
        (options(linker="aarch64-linux-gnu-gcc"), ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-ld")),
        # The library that stands in for the target's is linked by cc.
        (options(arch="aarch64", native=False, linker="zig"), ("cc", "ld")),
        (options(kind="cuda"), ("cc", "ld", "nvcc")),
        (options(kind="cuda", native=False), ("cc", "ld", "nvcc")),
    ],
)
def test_compile_tvm_names_the_programs_that_its_options_call(
    given: compile_tvm.Options, programs: tuple[str, ...]
) -> None:
    assert compile_tvm.STAGE.programs(given) == programs


def test_another_nvcc_changes_the_key_of_cuda_engines_alone_and_is_named(folder: Path) -> None:
    nodes = {
        "cuda": Node("c", compile_tvm.STAGE, options("cuda")),
        "cpu": Node("n", compile_tvm.STAGE, options()),
        "onnxruntime": Node("o", compile_ort.STAGE, compile_ort.Options("CPUExecutionProvider", "cpu", "fp32")),
    }
    nvcc = install(folder, "nvcc", NVCC)
    before = {name: key_components(node, {}) for name, node in nodes.items()}
    install(folder, "nvcc", NVCC.replace("13.0", "13.1").replace("V13.1.88", "V13.1.12"))
    os.utime(nvcc, (2_000_000_000, 2_000_000_000))
    after = {name: key_components(node, {}) for name, node in nodes.items()}
    assert [name for name in nodes if before[name] != after[name]] == ["cuda"]
    assert describe_difference(before["cuda"], after["cuda"]) == [
        "tool nvcc: Cuda compilation tools, release 13.0, V13.0.88 -> Cuda compilation tools, release 13.1, V13.1.12"
    ]
    assert "nvcc" not in before["cpu"]["tools"]
