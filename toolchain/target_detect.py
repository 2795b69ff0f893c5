"""The tables of a profile for the machine we run on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.host import Host
from toolchain.llvm_cpus import CPUINFO_NAMES, compiled_features

# (CPU family, model) -> LLVM name, and the ARM (implementer, part).  Source: LLVM 22's
# llvm/lib/TargetParser/Host.cpp, getIntelProcessorTypeAndSubtype, getAMDProcessorTypeAndSubtype and
# getHostCPUNameForARMFromComponents; only what LLVM's table of our TVM names too.
_INTEL = {
    "haswell": (0x3C, 0x3F, 0x45, 0x46), "broadwell": (0x3D, 0x47, 0x4F, 0x56),
    "skylake": (0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), "rocketlake": (0xA7,), "icelake-client": (0x7D, 0x7E),
    "tigerlake": (0x8C, 0x8D), "alderlake": (0x97, 0x9A, 0xBF), "raptorlake": (0xB7, 0xBA), "meteorlake": (0xAA, 0xAC),
    "icelake-server": (0x6A, 0x6C), "sapphirerapids": (0x8F,), "emeraldrapids": (0xCF,), "graniterapids": (0xAD,),
    "graniterapids-d": (0xAE,), "sierraforest": (0xAF,),
}  # fmt: skip
_ARM = {
    (0x41, 0xD03): "cortex-a53", (0x41, 0xD04): "cortex-a35", (0x41, 0xD05): "cortex-a55",
    (0x41, 0xD07): "cortex-a57", (0x41, 0xD08): "cortex-a72", (0x41, 0xD09): "cortex-a73",
    (0x41, 0xD0A): "cortex-a75", (0x41, 0xD0B): "cortex-a76", (0x41, 0xD0D): "cortex-a77",
    (0x41, 0xD41): "cortex-a78", (0x41, 0xD44): "cortex-x1", (0x41, 0xD46): "cortex-a510",
    (0x41, 0xD47): "cortex-a710", (0x41, 0xD48): "cortex-x2", (0x41, 0xD4D): "cortex-a715",
    (0x41, 0xD4E): "cortex-x3", (0x41, 0xD80): "cortex-a520", (0x41, 0xD81): "cortex-a720",
    (0x41, 0xD82): "cortex-x4", (0x41, 0xD0C): "neoverse-n1", (0x41, 0xD49): "neoverse-n2",
    (0x41, 0xD8E): "neoverse-n3", (0x41, 0xD40): "neoverse-v1", (0x41, 0xD4F): "neoverse-v2",
    (0x41, 0xD84): "neoverse-v3", (0xC0, 0xAC3): "ampere1", (0xC0, 0xAC4): "ampere1a", (0x46, 0x001): "a64fx",
    (0x48, 0xD01): "tsv110",
}  # fmt: skip

# What to fall back to if the processor is unknown, or a hypervisor hides some of its features.
_LEVELS = {"x86_64": ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64"), "aarch64": ("generic",)}

_SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def base_profile(host: Host) -> str:
    """The shipped profile closest to ``host``, which gives what cannot be detected."""
    if host.arch == "aarch64":
        return "cortex-a76" if "asimddp" in host.cpu_features else "cortex-a72"
    return "x86-64-v4" if compiled_features("x86_64", "x86-64-v4") <= host.cpu_features else "x86-64-v3"


def detected_tables(host: Host, own_caches: bool = True) -> dict[str, Any]:
    """What is known of ``host``, in the form of a profile's tables, to be laid over :func:`base_profile`.

    Args:
        host: a machine whose ``arch`` is ``"x86_64"`` or ``"aarch64"``.
        own_caches: whether to read cache sizes from this machine's sysfs.
    """
    cpu = llvm_cpu(host)
    attributes = _extra_attributes(host, cpu)
    bits, registers = _vectors(host)
    tables: dict[str, Any] = {
        "os": host.os,
        "arch": host.arch,
        "kind": "cpu",
        "cpu": {
            "model": cpu,
            "features": [],
            "vector_bits": bits,
            "registers": registers,
            **(_caches(_SYSFS_CACHES) if own_caches else {}),
        },
        "tvm": {
            "target": {"kind": "llvm", "mtriple": f"{host.arch}-linux-gnu", "mcpu": cpu, "mattr": attributes},
            "linker": "cc",
        },
    }
    if host.arch == "x86_64":
        # Without VNNI products of u8 and s8 are summed in saturating 16 bits.
        tables["numerics"] = {"reduce_range": not host.cpu_features & {"avx512_vnni", "avx_vnni"}}
    return tables


def llvm_cpu(host: Host) -> str:
    """The LLVM processor name whose code surely runs on ``host``: its own, else the highest level it reaches."""
    own = own_name(host)
    for name in (*([own] if own else []), *_LEVELS[host.arch]):
        if compiled_features(host.arch, name) <= host.cpu_features:
            return name
    return _LEVELS[host.arch][-1]


def own_name(host: Host) -> str:
    """LLVM's name of the processor of ``host``, e.g. ``"cortex-a72"``; "" if it is not known."""
    if not host.cpu_ids:
        return ""
    if host.arch == "aarch64":
        # Of unlike cores the last are the big ones, by the custom of device trees.
        return _ARM.get(host.cpu_ids[-1], "")
    family, model = host.cpu_ids[0]
    if host.cpu_vendor == "AuthenticAMD":
        return _amd(family, model)
    if host.cpu_vendor == "GenuineIntel" and family == 6:
        if model == 0x55:
            features = host.cpu_features
            return "cooperlake" if "avx512_bf16" in features else _skylake_server(features)
        return next((name for name, models in _INTEL.items() if model in models), "")
    return ""


def _skylake_server(features: frozenset[str]) -> str:
    return "cascadelake" if "avx512_vnni" in features else "skylake-avx512"


def _amd(family: int, model: int) -> str:
    if family == 23:
        return "znver2" if model >= 0x30 else "znver1"
    if family == 25:
        return "znver4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF else "znver3"
    return "znver5" if family == 26 else ""


def _extra_attributes(host: Host, cpu: str) -> list[str]:
    """``mattr`` entries for what the machine has beyond its LLVM name, e.g. VNNI beyond x86-64-v4."""
    if cpu not in _LEVELS[host.arch]:
        return []
    found: list[str] = []
    for feature, flags in sorted(CPUINFO_NAMES[host.arch].items()):
        needed = compiled_features(host.arch, cpu, [f"+{feature}"])
        if needed <= host.cpu_features and not set(flags) <= compiled_features(host.arch, cpu):
            found.append(f"+{feature}")
    return found


def _vectors(host: Host) -> tuple[int, int]:
    """Width in bits and number of vector registers; SVE is counted by its NEON part, whose width is fixed."""
    if host.arch == "aarch64":
        return 128, 32
    if compiled_features("x86_64", "x86-64-v4") <= host.cpu_features:
        return 512, 32
    return (256 if "avx2" in host.cpu_features else 128), 16


def _caches(folder: Path) -> Mapping[str, int]:
    sizes: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        key = {("1", "Data"): "l1d_kib", ("2", "Unified"): "l2_kib"}.get((level, kind))
        match = re.fullmatch(r"(\d+)K", size)
        if key and match:
            sizes[key] = int(match[1])
    return sizes
