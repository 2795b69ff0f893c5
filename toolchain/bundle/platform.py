"""The ``platform`` of a bundle's manifest, in the names that OCI tools use (those of Go)."""

from __future__ import annotations

import re

from toolchain.bundle.manifest import BundleManifest

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "wasm32": "wasm"}
_SYSTEMS = {"wasi": "wasip1"}
_VARIANTS = {"aarch64": "v8", "armv7l": "v7"}


def oci_platform(info: BundleManifest) -> dict[str, str]:
    """``{"os", "architecture"[, "variant"]}`` from the requirements and the profile of a bundle.

    The variant is ``v1`` to ``v4`` for x86-64 micro-architecture levels (as GOAMD64 has it), ``v8`` for arm64,
    ``v7`` for arm.
    Finer features have no place in OCI's platform (``features`` is reserved); they are in ``bundle.json``.
    """
    arch, system = (str(info.requirements.get(key, "")) for key in ("arch", "os"))
    platform = {
        "os": _SYSTEMS.get(system, system) or "linux",
        "architecture": _ARCHITECTURES.get(arch, arch) or "unknown",
    }
    cpu = info.target.profile.get("cpu")
    model = str(cpu.get("model", "")) if isinstance(cpu, dict) else ""
    level = re.fullmatch(r"x86-64-(v[1-4])", model)
    if level:
        platform["variant"] = level.group(1)
    elif arch in _VARIANTS:
        platform["variant"] = _VARIANTS[arch]
    return platform
