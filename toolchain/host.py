"""The machine we run on, found without importing anything heavy, and what it cannot run.

The bundle runtime uses this module too: it needs the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPUINFO_VARIABLE = "TOOLCHAIN_HOST_CPUINFO"

# A 32-bit process on a 64-bit ARM kernel is told "armv8l".
_ARCH_NAMES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "armv8l": "armv7l"}

# CUDA driver API: CUdevice_attribute values 75 and 76, and the size we give cuDeviceGetName.
_CC_MAJOR, _CC_MINOR, _NAME_BYTES = 75, 76, 256


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA device: its name as the driver gives it, and its architecture, e.g. ``"sm_80"``."""

    name: str
    arch: str


@dataclass(frozen=True, slots=True)
class Host:
    """A machine.

    Attributes:
        os: lower-case system name, e.g. ``"linux"``.
        arch: ``"x86_64"``, ``"aarch64"``, ``"armv7l"``, ``"riscv64"``, or what the system calls it.
        cpu_model: the processor's name, or an empty string.
        cpu_features: names as in /proc/cpuinfo that *every* core has.
        cores: processors that this process may run on.
        memory_mb: physical memory in MiB, 0 if unknown.
        glibc: version of the C library, e.g. ``"2.36"``, or an empty string (not glibc).
        cuda: CUDA devices, in the driver's order.
        cpu_ids: identity of each core as integers from /proc/cpuinfo: x86 ``(family, model)``,
            ARM ``(implementer, part)``.
        cpu_vendor: x86 vendor string, e.g. ``"AuthenticAMD"``, or an empty string.
    """

    os: str
    arch: str
    cpu_model: str
    cpu_features: frozenset[str]
    cores: int
    memory_mb: int
    glibc: str
    cuda: tuple[CudaDevice, ...] = ()
    cpu_ids: tuple[tuple[int, int], ...] = ()
    cpu_vendor: str = ""

    def describe(self) -> str:
        """The processor in a few words for messages: its name, or the architecture."""
        return self.cpu_model or self.arch


def detect_host() -> Host:
    """The machine this process runs on.

    Never raises: what cannot be found out is left empty.  The environment variable
    ``TOOLCHAIN_HOST_CPUINFO`` may name another file in the format of /proc/cpuinfo; then the
    architecture and everything about the processor but the number of cores comes from that file.
    It exists to test what the toolchain says on machines that are not at hand.
    """
    override = os.environ.get(CPUINFO_VARIABLE, "")
    text = _read(Path(override or "/proc/cpuinfo"))
    arch = platform.machine().lower()
    if override:
        arch = _arch_of_cpuinfo(text) or arch
    return describe_host(
        text,
        os=platform.system().lower(),
        arch=arch,
        cores=_core_count(),
        memory_mb=_memory_mb(_read(Path("/proc/meminfo"))),
        glibc=_glibc_version(),
        cuda=_cuda_devices(),
    )


def describe_host(
    cpuinfo: str, *, os: str, arch: str, cores: int, memory_mb: int, glibc: str, cuda: tuple[CudaDevice, ...] = ()
) -> Host:
    """A machine by the text of its /proc/cpuinfo and what else is known of it; ``arch`` as ``uname -m`` names it."""
    blocks = _parse_cpuinfo(cpuinfo)
    return Host(
        os=os,
        arch=_ARCH_NAMES.get(arch, arch),
        cpu_model=_cpu_model(blocks),
        cpu_features=_cpu_features(blocks),
        cores=cores,
        memory_mb=memory_mb,
        glibc=glibc,
        cuda=cuda,
        cpu_ids=tuple(ids for core in blocks if (ids := _core_ids(core)) is not None),
        cpu_vendor=next((core["vendor_id"] for core in blocks if "vendor_id" in core), ""),
    )


def incompatibilities(requirements: Mapping[str, Any], host: Host) -> list[str]:
    """Why ``host`` cannot run what needs ``requirements``: one line each, none if it can.

    Args:
        requirements: what :meth:`toolchain.target.TargetProfile.requirements` returns:
            ``{"os", "arch", "cpu_features", "libc": {"name", "min"}, "cuda_arch"}``.
        host: the machine.
    """
    found: list[str] = []
    if requirements["os"] != host.os:
        found.append(f"needs operating system {requirements['os']}, this machine runs {host.os}")
    if requirements["arch"] != host.arch:
        # Feature names of another architecture would only repeat that it is another one.
        return [*found, f"needs a processor of architecture {requirements['arch']}, this machine is {host.arch}"]
    missing = sorted(set(requirements["cpu_features"]) - host.cpu_features)
    if missing:
        plural = "features" if len(missing) > 1 else "feature"
        lacks = f"which this machine ({host.describe()}) lacks"
        found.append(f"needs CPU {plural} {', '.join(missing)}, {lacks}")
    found += _libc_problem(requirements.get("libc"), host)
    found += _cuda_problem(requirements.get("cuda_arch"), host)
    return found


def _libc_problem(libc: Mapping[str, str] | None, host: Host) -> list[str]:
    if libc is None or libc["name"] != "glibc":
        return []
    if not host.glibc:
        return [f"needs glibc {libc['min']} or newer, this machine has another C library"]
    if _version(host.glibc) < _version(libc["min"]):
        return [f"needs glibc {libc['min']} or newer, this machine has {host.glibc}"]
    return []


def _cuda_problem(arch: str | None, host: Host) -> list[str]:
    if arch is None:
        return []
    if not host.cuda:
        return [f"needs a CUDA device of architecture {arch}, this machine has no CUDA device"]
    if any(cuda_runs(arch, device.arch) for device in host.cuda):
        return []
    devices = ", ".join(f"{device.name} ({device.arch})" for device in host.cuda)
    return [f"needs a CUDA device that runs {arch} code, this machine has {devices}"]


def cuda_runs(built_for: str, device: str) -> bool:
    """Whether machine code (cubin) for ``built_for`` runs on a ``device`` of another architecture.

    Rule of the CUDA C++ Programming Guide, "Binary Compatibility": same major version, the device's
    minor version not lower; an architecture-specific build (``sm_90a``) runs on exactly that one.
    """
    code, chip = _cuda_version(built_for), _cuda_version(device)
    if code is None or chip is None:
        return False
    if built_for[-1].isalpha():
        return code == chip
    return code[0] == chip[0] and code[1] <= chip[1]


def _cuda_version(arch: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"sm_(\d+)(\d)[a-z]?", arch)
    return (int(match[1]), int(match[2])) if match else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """One dictionary per block of /proc/cpuinfo (a core; on some ARM kernels a trailing board block)."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, _, value in pairs}
        if values:
            blocks.append(values)
    return blocks


def _arch_of_cpuinfo(text: str) -> str:
    if re.search(r"^flags\s*:.*\blm\b", text, flags=re.MULTILINE):
        return "x86_64"
    if re.search(r"^isa\s*:\s*rv64", text, flags=re.MULTILINE):
        return "riscv64"
    if re.search(r"^Features\s*:.*\basimd\b", text, flags=re.MULTILINE):
        return "aarch64"
    return "armv7l" if re.search(r"^Features\s*:.*\bneon\b", text, flags=re.MULTILINE) else ""


def _cpu_features(cores: list[dict[str, str]]) -> frozenset[str]:
    per_core = [_isa_extensions(core["isa"]) for core in cores if "isa" in core]
    per_core += [set(text.split()) for core in cores if (text := core.get("flags", core.get("Features"))) is not None]
    return frozenset(set.intersection(*per_core)) if per_core else frozenset()


def _isa_extensions(text: str) -> set[str]:
    """``"rv64imafdc_zba_zbb"`` -> the letters and the longer names (RISC-V ISA, "ISA Extension Naming")."""
    letters, *names = text.lower().removeprefix("rv64").split("_")
    return {*letters.replace("g", "imafd"), *names}


def _cpu_model(cores: list[dict[str, str]]) -> str:
    for key in ("model name", "Model", "Hardware"):
        for core in cores:
            if core.get(key):
                return core[key]
    ids = [f"{core['CPU implementer']}/{core['CPU part']}" for core in cores if "CPU part" in core]
    return "ARM " + " + ".join(dict.fromkeys(ids)) if ids else ""


def _core_ids(core: dict[str, str]) -> tuple[int, int] | None:
    keys = ("CPU implementer", "CPU part") if "CPU part" in core else ("cpu family", "model")
    try:
        return int(core[keys[0]], 0), int(core[keys[1]], 0)
    except (KeyError, ValueError):
        return None


def _core_count() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _memory_mb(meminfo: str) -> int:
    match = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, flags=re.MULTILINE)
    return int(match[1]) // 1024 if match else 0


def _glibc_version() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    except (AttributeError, ValueError, OSError):
        return ""


def _cuda_devices() -> tuple[CudaDevice, ...]:
    """The devices of the CUDA driver, found without a CUDA toolkit.

    A child process asks the driver: a process that has called cuInit can no longer use CUDA in
    children that it forks, and the build forks its workers.
    """
    import subprocess

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    try:
        command = [sys.executable, "-I", "-S", __file__]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return tuple(CudaDevice(name, arch) for name, arch in json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _query_cuda_driver() -> list[CudaDevice]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return []
        devices = (_cuda_device(driver, index) for index in range(count.value))
        return [device for device in devices if device is not None]
    except (OSError, AttributeError):
        return []


def _cuda_device(driver: ctypes.CDLL, index: int) -> CudaDevice | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    codes = (
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device),
    )
    if any(codes):
        return None
    return CudaDevice(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}")


if __name__ == "__main__":  # the child process of _cuda_devices
    print(json.dumps([[device.name, device.arch] for device in _query_cuda_driver()]))
