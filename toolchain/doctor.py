"""What this machine can build, run and measure, and what to install for the rest.

Nothing heavy is imported: libraries are judged by their installed metadata, tools by PATH.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from toolchain.errors import ToolchainError
from toolchain.host import Host, detect_host, incompatibilities
from toolchain.install import install_command
from toolchain.target import TargetProfile, list_targets, load_target
from toolchain.tvm.link import Linker

LOW_DISK = 4 << 30
"""Bytes free below which the cache folder's disk is called nearly full: a build of a 1 GB model fills them."""

_EXTRAS = ("build", "images", "digits")
_PURPOSES = {
    "apache-tvm": "compile with TVM",
    "onnx": "every stage after the export",
    "onnxconverter-common": "quantize: fp16",
    "onnxruntime": "optimize, quantize, verify, run",
    "onnxscript": "export",
    "onnxslim": "optimize",
    "pillow": "run on images",
    "safetensors": "read checkpoints",
    "scikit-learn": "data of the digits recipe",
    "torch": "export, reference",
    "ziglang": "link TVM engines for other machines",
}
_ALIASES = {"onnxruntime": ("onnxruntime-gpu",)}
_OPTIONAL = {"ziglang"}  # of the extra "build": needed by targets that link with it alone

_PROGRAMS = {
    "cc": ("link TVM engines for this machine", "apt-get install gcc"),
    "nvcc": ("compile with TVM for CUDA", "apt-get install nvidia-cuda-toolkit  # Debian: component non-free"),
    "aarch64-linux-gnu-gcc": ("another cross linker for aarch64", "apt-get install gcc-aarch64-linux-gnu"),
    "ssh": ("measure on devices (build --device)", "apt-get install openssh-client"),
    "qemu-aarch64": ("start aarch64 programs here by hand", "apt-get install qemu-user"),
}
_PROGRAM_ALIASES = {"qemu-aarch64": ("qemu-aarch64-static",)}


@dataclass(frozen=True, slots=True)
class Tool:
    """A library or program.

    Attributes:
        kind: ``"library"`` or ``"program"``.
        found: its version, or the program's path and version; empty if it is missing.
        problem: why it does not serve: missing, or a version that is not supported; empty if it does.
        install: the command that installs it.
    """

    name: str
    kind: str
    purpose: str
    found: str
    problem: str
    install: str

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class TargetState:
    """What this machine can do for one target; each list says why not, and is empty where it can.

    ``run`` is empty where some engines run: those ahead of time need no runtime, see :attr:`Diagnosis.runs`.
    """

    name: str
    onnxruntime: tuple[str, ...]
    tvm: tuple[str, ...]
    run: tuple[str, ...]
    measure: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of the cache folder; sizes in bytes."""

    folder: str
    free: int
    writable: bool

    @property
    def problem(self) -> str:
        if not self.writable:
            return "cannot be written"
        return "nearly full" if self.free < LOW_DISK else ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything :func:`examine` found.  ``missing`` holds what a build for this machine lacks."""

    host: Host
    disk: Disk
    tools: tuple[Tool, ...]
    targets: tuple[TargetState, ...]
    missing: tuple[Tool, ...]

    @property
    def cannot_run(self) -> tuple[str, ...]:
        """Why bundles for this machine can't run here; empty if they can."""
        return next(state.run for state in self.targets if state.name == "host")

    @property
    def runs(self) -> str:
        """Which engines run on this machine, in words."""
        if self.cannot_run:
            return "; ".join(self.cannot_run)
        return f"engines ahead of time alone: {_no_runtime()}" if _no_runtime() else "everything is there"

    @property
    def installs(self) -> tuple[str, ...]:
        """The commands that install everything that is missing, each once."""
        return tuple(dict.fromkeys(tool.install for tool in self.tools if not tool.ok))

    def to_json(self) -> dict[str, Any]:
        host = asdict(self.host) | {"cpu_features": sorted(self.host.cpu_features)}
        return {
            "ready": not self.missing,
            "can_run": not self.cannot_run,
            "runs": self.runs,
            "missing": [tool.name for tool in self.missing],
            "install": list(self.installs),
            "host": host,
            "cache": {**asdict(self.disk), "problem": self.disk.problem},
            "tools": [{**asdict(tool), "ok": tool.ok} for tool in self.tools],
            "targets": [asdict(state) for state in self.targets],
        }


def examine(cache_folder: Path) -> Diagnosis:
    """Look at this machine and at what is installed.

    Raises:
        ToolchainError: a shipped profile cannot be read, or ``toolchain`` itself is not installed.
    """
    host = detect_host()
    targets = tuple(target_state(profile, host) for profile in map(load_target, list_targets()))
    missing = tuple(missing_tools(load_target("host")))
    return Diagnosis(host, _disk(cache_folder), all_tools(), targets, missing)


@cache
def all_tools() -> tuple[Tool, ...]:
    """Every library of the extras and every program that a build can use."""
    libraries = [_library(name, spec, extra) for name, (spec, extra) in _requirements().items()]
    return (*libraries, *(_program(name) for name in _PROGRAMS))


def missing_tools(profile: TargetProfile) -> list[Tool]:
    """What is missing to build every candidate for ``profile`` with both backends."""
    return [tool for tool in all_tools() if not tool.ok and tool.name in _needed(profile)]


def target_state(profile: TargetProfile, host: Host) -> TargetState:
    """What ``host`` can do for a target, and why not."""
    missing = {tool.name: f"{tool.name}: {tool.problem}" for tool in missing_tools(profile)}
    for_tvm = ["apache-tvm", "nvcc", profile.tvm.linker, "ziglang"]
    common = [text for name, text in missing.items() if name not in for_tvm]
    unbuilt = [f"there is no build of {name} for {profile.arch}" for name in profile.without_wheels]
    tvm = [*common, *(text for name, text in missing.items() if name in for_tvm)]
    if not tvm:
        tvm += _linker_problem(profile)
    run = incompatibilities(profile.requirements(), host)
    lacking = [_no_runtime()] if _no_runtime() else []
    if profile.kind != "cpu":  # engines ahead of time are for processors
        run += lacking
    measure = measure_problems(profile, run if profile.kind != "cpu" else [*run, *lacking])
    return TargetState(profile.name, (*common, *unbuilt), tuple(tvm), tuple(run), tuple(measure))


def _no_runtime() -> str:
    """What to install where neither ONNX Runtime nor TVM's run-time is; empty if one is."""
    if any(map(_version, ("onnxruntime", "onnxruntime-gpu", "apache-tvm"))):
        return ""
    return f"no runtime is installed: {install_command('onnxruntime')}, or the extra 'tvm'"


def measure_problems(profile: TargetProfile, run_problems: list[str]) -> list[str]:
    """Why engines for ``profile`` are not measured on a machine that has ``run_problems`` with them."""
    if profile.execute.how == "remote":
        return ["the profile says execute.how = 'remote': on a device only (build --device)"]
    if profile.execute.how != "native":
        return [f"the profile says execute.how = {profile.execute.how!r}"]
    if profile.kind == "cuda" and not run_problems and not _version("onnxruntime-gpu"):
        return ["ONNX Runtime engines need onnxruntime-gpu in place of onnxruntime; TVM engines are measured"]
    return run_problems


def _needed(profile: TargetProfile) -> set[str]:
    needed = {name for name, (_, extra) in _requirements().items() if extra == "build"} - _OPTIONAL
    needed.add("ziglang" if profile.tvm.linker.startswith("zig") else profile.tvm.linker)
    return needed | ({"nvcc"} if profile.kind == "cuda" else set())


def _linker_problem(profile: TargetProfile) -> list[str]:
    try:
        Linker(profile.tvm.linker, profile.arch, profile.runtime.abi.min).check()
    except ToolchainError as error:
        return [error.what]
    return []


@cache
def _requirements() -> dict[str, tuple[str, str]]:
    """Distribution -> (version specifier, extra), of the extras that users install."""
    found: dict[str, tuple[str, str]] = {}
    for line in importlib.metadata.requires("toolchain") or []:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*([^;\[]*?)\s*;\s*extra == [\"'](\w+)[\"']", line)
        if match and match[3] in _EXTRAS and match[1] not in found:
            found[match[1]] = (match[2], match[3])
    return dict(sorted(found.items(), key=lambda item: _EXTRAS.index(item[1][1])))


def _library(name: str, specifier: str, extra: str) -> Tool:
    version = next(filter(None, map(_version, (name, *_ALIASES.get(name, ())))), "")
    problem = "" if version else "not installed"
    if version and not version_allowed(version, specifier):
        problem = f"version {version}, needed {specifier}"
    return Tool(name, "library", _PURPOSES.get(name, ""), version, problem, install_command(extra))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_allowed(version: str, specifier: str) -> bool:
    """Whether ``version`` meets a specifier made of ``==``, ``>=``, ``<`` (all that the project's extras use).

    A local part such as ``+cpu`` does not count.  Raises ValueError for another operator.
    """
    plain = version.split("+")[0]
    for part in filter(None, (p.strip() for p in specifier.split(","))):
        match = re.fullmatch(r"(==|>=|<)\s*(\S+)", part)
        if match is None:
            raise ValueError(f"version specifier {part!r}")
        have, want = _release(plain), _release(match[2])
        width = max(len(have), len(want))
        have, want = have + (0,) * (width - len(have)), want + (0,) * (width - len(want))
        held = {"==": plain == match[2], ">=": have >= want, "<": have < want}
        if not held[match[1]]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _program(name: str) -> Tool:
    purpose, install = _PROGRAMS[name]
    path = next(filter(None, map(shutil.which, (name, *_PROGRAM_ALIASES.get(name, ())))), None)
    if path is None:
        return Tool(name, "program", purpose, "", "not on PATH", install)
    return Tool(name, "program", purpose, " ".join(filter(None, [path, _program_version(path)])), "", install)


def _program_version(path: str) -> str:
    try:
        option = "-V" if Path(path).name == "ssh" else "--version"
        done = subprocess.run([path, option], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\d+\.\d+(\.\d+)*", done.stdout or done.stderr)
    return match[0] if match else ""


def _disk(folder: Path) -> Disk:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Disk(str(folder.absolute()), shutil.disk_usage(existing).free, writable)
