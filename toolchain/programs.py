"""Versions of programs that are no Python distributions: the compilers and linkers that a stage calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache

_TIMEOUT_S = 20


def program_version(name: str) -> str:
    """What the program ``name`` on PATH says about its version, e.g. ``"cc (Debian 12.2.0-14) 12.2.0"``.

    It is asked once as long as its file keeps size and times.  ``"not installed"`` if there is none; a program
    that names no version is known by the size and time of its file.
    """
    path = shutil.which(name)
    if path is None:
        return "not installed"
    try:
        info = os.stat(path)
    except OSError:
        return "not installed"
    return _ask(path, info.st_size, info.st_mtime_ns)


@cache
def _ask(path: str, size: int, mtime_ns: int) -> str:
    try:
        # Its messages must not depend on the user's language.
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
        lines = done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, ValueError, subprocess.SubprocessError):
        lines = []
    # nvcc gives its name and the copyright first.
    told = next((line.strip() for line in lines if re.search(r"\d\.\d", line)), "")
    return told or f"unknown ({size} bytes, modified {mtime_ns})"


_WASM = "wasm32"
_EMULATORS = {
    "aarch64": "qemu-aarch64", "armv7l": "qemu-arm", "riscv64": "qemu-riscv64", "x86_64": "qemu-x86_64",
    _WASM: "wasmtime",
}  # fmt: skip


def emulator_program(arch: str, cpu: str) -> str:
    """Name of the program on PATH that runs code for ``arch`` (QEMU, the static one first); "" if there is none.

    Args:
        arch: an architecture, or ``"wasm32"``.
        cpu: the processor that QEMU is told to be; without one it has every feature there is, and proves nothing.
    """
    name = _EMULATORS.get(arch) if cpu or arch == _WASM else None
    return next((each for each in (f"{name}-static", name or "") if name and shutil.which(each)), "")
