"""The processors and features that TVM's LLVM knows, readable without importing TVM.

TVM only logs a wrong ``mcpu`` or ``mattr`` and then compiles for a generic processor, so profiles are
checked here against ``data_llvm_cpus.json``.  ``python -m toolchain.llvm_cpus_generate`` writes that
file anew from the installed TVM.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_FILE = Path(__file__).with_name("data_llvm_cpus.json")

# LLVM feature -> names in /proc/cpuinfo, for the features whose instructions LLVM emits on its own.
# Features reached through intrinsics alone (AES, SHA, CRC32, RDRAND, AMX ...) are left out on purpose:
# LLVM's cortex-a72 "has" AES, the Raspberry Pi 4's does not, and compiled models never use it.
# Sources: LLVM 22 X86.td, AArch64Features.td, ARMFeatures.td and RISCVFeatures.td; Linux
# arch/x86/include/asm/cpufeatures.h, Documentation/arch/arm64/elf_hwcaps.rst, arch/arm/kernel/setup.c and
# arch/riscv/kernel/cpufeature.c.
CPUINFO_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "cmov": ("cmov",), "cx8": ("cx8",), "cx16": ("cx16",), "fxsr": ("fxsr",), "mmx": ("mmx",),
        "sse": ("sse",), "sse2": ("sse2",), "sse3": ("pni",), "ssse3": ("ssse3",), "sse4.1": ("sse4_1",),
        "sse4.2": ("sse4_2",), "sse4a": ("sse4a",), "popcnt": ("popcnt",), "sahf": ("lahf_lm",),
        "avx": ("avx",), "avx2": ("avx2",), "f16c": ("f16c",), "fma": ("fma",), "fma4": ("fma4",), "xop": ("xop",),
        "tbm": ("tbm",), "bmi": ("bmi1",), "bmi2": ("bmi2",), "lzcnt": ("abm",), "movbe": ("movbe",),
        "gfni": ("gfni",), "avxvnni": ("avx_vnni",),
        "avx512f": ("avx512f",), "avx512cd": ("avx512cd",), "avx512bw": ("avx512bw",), "avx512dq": ("avx512dq",),
        "avx512vl": ("avx512vl",), "avx512ifma": ("avx512ifma",), "avx512vbmi": ("avx512vbmi",),
        "avx512vbmi2": ("avx512_vbmi2",), "avx512vnni": ("avx512_vnni",), "avx512bitalg": ("avx512_bitalg",),
        "avx512vpopcntdq": ("avx512_vpopcntdq",), "avx512bf16": ("avx512_bf16",), "avx512fp16": ("avx512_fp16",),
    },
    "aarch64": {
        "fp-armv8": ("fp",), "neon": ("asimd",), "lse": ("atomics",), "fullfp16": ("fphp", "asimdhp"),
        "rdm": ("asimdrdm",), "dotprod": ("asimddp",), "rcpc": ("lrcpc",), "rcpc-immo": ("ilrcpc",),
        "jsconv": ("jscvt",), "complxnum": ("fcma",), "fp16fml": ("asimdfhm",), "altnzcv": ("flagm2",),
        "flagm": ("flagm",), "fptoint": ("frint",), "i8mm": ("i8mm",), "bf16": ("bf16",), "sve": ("sve",),
        "sve2": ("sve2",), "sve2p1": ("sve2p1",), "cssc": ("cssc",), "mops": ("mops",), "lse128": ("lse128",),
    },
    # 32-bit kernels say "vfpd32" for 32 registers of 64 bits, "idiva" and "idivt" for division in the two encodings.
    "armv7l": {
        "dsp": ("edsp",), "vfp2": ("vfp",), "vfp3": ("vfpv3",), "vfp4": ("vfpv4",), "neon": ("neon",),
        "d32": ("vfpd32",), "hwdiv": ("idivt",), "hwdiv-arm": ("idiva",), "fullfp16": ("fphp", "asimdhp"),
        "dotprod": ("asimddp",), "fp16fml": ("asimdfhm",), "bf16": ("asimdbf16",), "i8mm": ("i8mm",),
    },
    # The letters and the names after them on the line "isa".
    "riscv64": {
        name: (name,)
        for name in (*"imafdcv", "zba", "zbb", "zbc", "zbs", "zicond", "zfh", "zfhmin", "zvfh", "zcb")
    },
    # The proposals that a WebAssembly engine may lack, in LLVM's own names; /proc/cpuinfo has none of them.
    "wasm32": {
        name: (name,)
        for name in ("bulk-memory", "multivalue", "nontrapping-fptoint", "relaxed-simd", "sign-ext", "simd128")
    },
}  # fmt: skip

# Further /proc/cpuinfo names that a profile may ask for although LLVM never emits them unasked.
_OTHER_CPUINFO_NAMES: Mapping[str, str] = {
    "x86_64": "aes pclmulqdq sha_ni vaes vpclmulqdq adx rdrand rdseed xsave xsaveopt xsavec fsgsbase erms fsrm "
    "amx_tile amx_int8 amx_bf16 amx_fp16 avx512_vp2intersect movdiri movdir64b lm nx syscall",
    "aarch64": "aes pmull sha1 sha2 sha3 sha512 sm3 sm4 crc32 cpuid evtstrm dcpop dcpodp uscat dit ssbs sb paca pacg "
    "sveaes svepmull svebitperm svesha3 svesm4 svei8mm svebf16 svef32mm svef64mm bti mte rng sme sme2 afp rpres",
    "armv7l": "swp half thumb fastmult java thumbee tls lpae evtstrm vfpv3d16 aes pmull sha1 sha2 crc32 sb ssbs",
    "riscv64": "h zicsr zifencei zihintpause zicbom zicboz sstc svinval svnapot svpbmt",
    "wasm32": "",
}


@dataclass(frozen=True, slots=True)
class ArchTable:
    """What LLVM knows of one architecture.

    Attributes:
        features: every name allowed in ``mattr`` after its sign.
        cpus: ``mcpu`` name -> those of its features that are keys of :data:`CPUINFO_NAMES`.
        implies: such a feature -> the features that switching it on brings along, itself included.
    """

    features: frozenset[str]
    cpus: Mapping[str, frozenset[str]]
    implies: Mapping[str, frozenset[str]]


@functools.cache
def table(arch: str) -> ArchTable:
    """The table of ``arch``, a key of :data:`CPUINFO_NAMES`.

    Raises:
        KeyError: another architecture.
    """
    data: dict[str, Any] = json.loads(DATA_FILE.read_text())["archs"][arch]
    return ArchTable(
        features=frozenset(data["features"].split()),
        cpus={name: frozenset(features.split()) for name, features in data["cpus"].items()},
        implies={name: frozenset(features.split()) for name, features in data["implies"].items()},
    )


@functools.cache
def cpuinfo_names(arch: str) -> frozenset[str]:
    """Every /proc/cpuinfo feature name that a profile for ``arch`` may ask for."""
    emitted = {name for names in CPUINFO_NAMES[arch].values() for name in names}
    return frozenset(emitted | set(_OTHER_CPUINFO_NAMES[arch].split()))


def compiled_features(arch: str, cpu: str, attributes: Iterable[str] = ()) -> frozenset[str]:
    """The /proc/cpuinfo names that code compiled for ``cpu`` and ``attributes`` may need.

    Args:
        arch: a key of :data:`CPUINFO_NAMES`.
        cpu: an LLVM processor name (``mcpu``).
        attributes: signed LLVM feature names (``mattr``), later ones winning, e.g. ``["+dotprod"]``.

    Raises:
        KeyError: unknown architecture or processor.
    """
    known = table(arch)
    features = set(known.cpus[cpu])
    for attribute in attributes:
        name = attribute[1:]
        if attribute.startswith("+"):
            features |= known.implies.get(name, frozenset())
        else:
            # Switching a feature off also switches off those that need it.
            features -= {f for f in features if name == f or name in known.implies[f]}
    return frozenset(flag for feature in features for flag in CPUINFO_NAMES[arch][feature])
