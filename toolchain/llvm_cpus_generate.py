"""Writes ``data_llvm_cpus.json`` from the installed TVM: ``python -m toolchain.llvm_cpus_generate``.

LLVM has no call that lists every feature of an architecture, but prints them when ``mattr`` holds
``+help``; a child process does that, because LLVM writes to the process's own stderr.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from toolchain.llvm_cpus import CPUINFO_NAMES, DATA_FILE

_TRIPLES = {
    "x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "armv7l": "armv7l-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu", "wasm32": "wasm32-unknown-wasi",
}  # fmt: skip
_BASE_CPU = {
    "x86_64": "x86-64", "aarch64": "generic", "armv7l": "generic", "riscv64": "generic-rv64", "wasm32": "mvp",
}  # fmt: skip
_OTHER_WIDTH = {"armv7l": "mclass", "riscv64": "32bit"}
"""A feature of the processors that LLVM lists for the triple although they don't run its code."""
_HELP = """
import sys
from tvm.target import Target, codegen
codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": sys.argv[1], "mattr": ["+help"]}))
"""


def generate() -> str:
    """The text of the data file, the same for the same TVM.

    Raises:
        ImportError: TVM is not installed.
        RuntimeError: LLVM no longer prints its features, or knows one of ours under another name.
    """
    import tvm
    from tvm.target import codegen

    archs = {arch: _arch(arch, triple) for arch, triple in _TRIPLES.items()}
    llvm = int(codegen.llvm_version_major())
    return json.dumps({"tvm": str(tvm.__version__), "llvm": llvm, "archs": archs}, indent=1, sort_keys=True) + "\n"


def _arch(arch: str, triple: str) -> dict[str, Any]:
    from tvm.target import Target, codegen

    every = _all_features(triple)
    emitted = set(CPUINFO_NAMES[arch])
    if unknown := emitted - every:
        raise RuntimeError(f"LLVM does not know these {arch} features: {sorted(unknown)}")

    def names(cpu: str, *attributes: str) -> set[str]:
        target = Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu, "mattr": list(attributes)})
        return {str(name) for name in codegen.llvm_get_cpu_features(target)}

    def features(cpu: str, *attributes: str) -> str:
        return " ".join(sorted(emitted & names(cpu, *attributes)))

    listed = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple})))
    cpus = [cpu for cpu in listed if _OTHER_WIDTH.get(arch) not in names(cpu)] if arch in _OTHER_WIDTH else listed
    base = set(features(_BASE_CPU[arch]).split())
    implies = {f: {f} | (set(features(_BASE_CPU[arch], f"+{f}").split()) - base) for f in sorted(emitted)}
    return {
        "triple": triple,
        "features": " ".join(sorted(every)),
        "cpus": {cpu: features(cpu) for cpu in cpus},
        "implies": {name: " ".join(sorted(names)) for name, names in implies.items()},
    }


def _all_features(triple: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", _HELP, triple], capture_output=True, text=True, check=True)
    _, _, listing = done.stderr.partition("Available features for this target:")
    found = set(re.findall(r"^  (\S+)\s+- ", listing, flags=re.MULTILINE))
    if not found:
        raise RuntimeError(f"LLVM printed no features for {triple}: {done.stderr[-300:]}")
    return found


if __name__ == "__main__":
    DATA_FILE.write_text(generate())
    print(f"wrote {DATA_FILE}")
