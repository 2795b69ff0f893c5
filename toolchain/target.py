"""Target profiles: what hardware a bundle is for, and how models are made for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from toolchain import target_checks
from toolchain.config_errors import Key, check_schema_version, raise_problems, read_toml, shape_problems
from toolchain.config_types import SCHEMA, Name, SchemaNumber, Section
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.host import CPUINFO_VARIABLE, Host, detect_host, incompatibilities
from toolchain.llvm_cpus import compiled_features
from toolchain.target_parts import Backend, Cpu, Cuda, Execute, Limits, LlvmTarget, Numerics, Runtime, Tvm

__all__ = ["TargetProfile", "incompatibilities", "list_targets", "load_target", "shipped_folder"]

_WHAT, _CODE = "target profile", ExitCode.BAD_TARGET
_LIST_HINT = "`toolchain targets` lists the shipped profiles"


_OF_THIS_MACHINE: Any = {"execute": {"remote"}, "runtime": {"tvm_packages"}}


class TargetProfile(Section):
    """One kind of machine; the fields are those of its TOML file, with ``extends`` and ``detect`` resolved."""

    schema_version: SchemaNumber = Field(alias="schema", description="format of the file: 1")
    name: Name = Field(description="name of the profile")
    description: str = Field("", description="what the profile is for")
    os: Literal["linux", "wasi"] = Field(description="operating system: 'linux', or 'wasi' for WebAssembly")
    arch: Literal["x86_64", "aarch64", "armv7l", "riscv64", "wasm32"] = Field(
        description="'x86_64', 'aarch64', 'armv7l' (32-bit, hard float), 'riscv64' or 'wasm32'"
    )
    kind: Literal["cpu", "cuda"] = Field(description="'cpu' or 'cuda'")
    cpu: Cpu = Field(description="a table with model, vector_bits, registers, l1d_kib, l2_kib")
    cuda: Cuda | None = Field(None, description="a table with arch, for kind 'cuda'")
    tvm: Tvm = Field(description="a table with target, and linker")
    numerics: Numerics = Field(description="a table with precisions, activation, symmetric_activation")
    runtime: Runtime = Field(description="a table with engines and abi")
    limits: Limits = Field(
        default_factory=lambda: Limits.model_validate({}), description="a table with memory_mb, size_mb"
    )
    execute: Execute = Field(default_factory=lambda: Execute.model_validate({}), description="a table with how")

    _path: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any) -> None:
        """Keeps the file's path, which the loader hands over as the validation context."""
        if isinstance(context, Path):
            self._path = context

    @property
    def path(self) -> Path:
        """The file the profile came from."""
        return self._path

    def to_json(self) -> dict[str, Any]:
        """The whole profile with defaults filled in, without paths and addresses: for digests and for bundles."""
        return self.model_dump(mode="json", by_alias=True, exclude=_OF_THIS_MACHINE)

    @property
    def tvm_packages(self) -> Path | None:
        """The folder with TVM's packages for the target, if one is given."""
        return self._path.parent / self.runtime.tvm_packages if self.runtime.tvm_packages else None

    @property
    def without_wheels(self) -> tuple[Backend, ...]:
        """The backends whose libraries nobody builds for the architecture, so that they are never offered."""
        return ("onnxruntime",) if self.arch in target_checks.AHEAD_ONLY else ()

    def llvm(self) -> LlvmTarget:
        """The LLVM target of the processor: TVM's target, or its host part for a GPU.

        Raises:
            ValueError: a GPU profile without ``tvm.host``, which :func:`load_target` refuses.
        """
        target = self.tvm.host if self.tvm.host is not None else self.tvm.target
        if not isinstance(target, LlvmTarget):
            raise ValueError(f"profile {self.name} has no LLVM target")
        return target

    def requirements(self) -> dict[str, Any]:
        """What a machine must be to run code for this profile; goes into the bundle.

        ``cpu_features`` are those of the profile and those that code compiled for its ``mcpu`` and
        ``mattr`` may use, so that a profile that forgets one cannot ship an illegal instruction.
        """
        llvm = self.llvm()
        features = compiled_features(self.arch, llvm.mcpu, llvm.mattr) | set(self.cpu.features)
        libc = {"name": self.runtime.abi.libc, "min": self.runtime.abi.min}
        return {
            "os": self.os,
            "arch": self.arch,
            "cpu_features": sorted(features),
            # A static executable brings its C library along.
            "libc": None if self.runtime.form == "static" else libc,
            "cuda_arch": self.cuda.arch if self.cuda is not None else None,
        }

    def runs_natively_on(self, host: Host) -> bool:
        """Whether ``host`` is such a machine, so that engines can be run and timed on it as they are.

        False for profiles that say ``how = "remote"`` or ``"none"``: those are never run here.
        """
        return self.execute.how in ("native", "emulated") and not incompatibilities(self.requirements(), host)

    def tvm_target(self) -> dict[str, Any]:
        """The argument for ``tvm.target.Target``."""
        target = self._tvm_dict(self.tvm.target)
        if self.tvm.host is not None:
            target["host"] = self._tvm_dict(self.tvm.host)
        return target

    def _tvm_dict(self, part: Section) -> dict[str, Any]:
        every = part.model_dump(mode="json", by_alias=True)
        values = {key: value for key, value in every.items() if value not in (None, [])}
        if isinstance(part, LlvmTarget) and self.cpu.cores:
            values["num-cores"] = self.cpu.cores
        if isinstance(part, LlvmTarget) and self.arch == "wasm32":
            values["vector-width"] = self.cpu.vector_bits  # TVM would assume the same, and say so in each compilation
        return values


def shipped_folder() -> Path:
    """The folder of the shipped profiles: inside the installed package, or ``targets`` of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_targets"
    return installed if installed.is_dir() else package.parent / "targets"


def list_targets() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in shipped_folder().glob("*.toml")))


def is_path(name_or_path: str) -> bool:
    """Whether a target is given as a file rather than as the name of a shipped profile."""
    return name_or_path.endswith(".toml") or "/" in name_or_path


def load_target(name_or_path: str | Path, base: Path | None = None) -> TargetProfile:
    """Loads a profile, with all that it extends.

    Args:
        name_or_path: the name of a shipped profile, or the path of a TOML file.
        base: folder that a relative path starts from; the working directory if not given.

    Raises:
        ToolchainError: BAD_TARGET: an unknown name, a missing file, a cycle of ``extends``, or
            mistakes in the file, all of them at once.
    """
    path = _locate(str(name_or_path), base or Path(), where="")
    layers: list[tuple[Path, dict[str, Any]]] = []
    _read_layers(path, layers)
    own = layers[0][1]
    raw: dict[str, Any] = {}
    for _, layer in reversed(layers):
        raw = _merge(raw, layer)
    # These two are about one file and are never inherited.
    for key in ("name", "description", "schema"):
        raw.pop(key, None)
        if key in own:
            raw[key] = own[key]

    problems = [*shape_problems(TargetProfile, raw), *target_checks.sense_problems(raw)]
    raise_problems(problems, path, _WHAT, _CODE, file_of=lambda key: _origin(key, layers))
    return TargetProfile.model_validate(raw, context=path)


def _locate(name: str, base: Path, where: str) -> Path:
    if is_path(name):
        return base / name
    path = shipped_folder() / f"{name}.toml"
    if name not in list_targets():
        shipped = list_targets()
        hint = f"{_LIST_HINT}; for a file of your own give its path, ending in .toml"
        message = f"unknown target {name!r}; shipped profiles: {', '.join(shipped)}{did_you_mean(name, shipped)}"
        raise ToolchainError(message, where=where, hint=hint, code=_CODE)
    return path


def _read_layers(path: Path, layers: list[tuple[Path, dict[str, Any]]], where: str = "") -> None:
    """Appends the tables of ``path``, then those of what it extends, nearest first."""
    chain = [entry.resolve() for entry, _ in layers]
    if path.resolve() in chain:
        names = " -> ".join(entry.name for entry in (*(p for p, _ in layers), path))
        raise ToolchainError(f"extends goes round in a circle: {names}", where=where, code=_CODE)
    if where and not path.is_file():
        hint = f"a path is relative to the file that names it; {_LIST_HINT}"
        raise ToolchainError(f"extends {path}, which does not exist", where=where, hint=hint, code=_CODE)
    data = read_toml(path, _WHAT, _CODE, hint=_LIST_HINT)
    check_schema_version(data, path, _WHAT, SCHEMA, _CODE)
    parent, detect = data.pop("extends", None), data.pop("detect", False)
    layers.append((path, data))
    if not isinstance(detect, bool):
        raise ToolchainError(f"got {detect!r}; allowed: true or false", where=f"{path}: detect", code=_CODE)
    if detect:
        if parent is not None:
            message = "a detected profile cannot extend another; allowed: detect = true, or extends"
            raise ToolchainError(message, where=f"{path}: extends", code=_CODE)
        parent = _add_detected(path, layers)
    if parent is None:
        return
    where = f"{path}: extends"
    if not isinstance(parent, str) or not parent:
        message = f"got {parent!r}; allowed: the name of a shipped profile, or a path ending in .toml"
        raise ToolchainError(message, where=where, code=_CODE)
    _read_layers(_locate(parent, path.parent, where), layers, where)


def _add_detected(path: Path, layers: list[tuple[Path, dict[str, Any]]]) -> str:
    from toolchain.target_detect import base_profile, detected_tables

    host = detect_host()
    if host.os != "linux" or host.arch not in ("x86_64", "aarch64"):
        message = f"this machine ({host.os}, {host.arch}) cannot be described; allowed: Linux on x86_64 or aarch64"
        raise ToolchainError(message, where=f"{path}: detect", hint=_LIST_HINT, code=_CODE)
    pretended = bool(os.environ.get(CPUINFO_VARIABLE))
    layers.append((path, detected_tables(host, own_caches=not pretended)))
    return base_profile(host)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``: tables key by key, anything else (lists too) replaced.

    A table inside whose ``kind`` is another one is replaced too: the keys of an llvm target mean
    nothing in a cuda target.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _kinds_differ(below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _kinds_differ(under: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return "kind" in under and "kind" in over and under["kind"] != over["kind"]


def _origin(key: Key, layers: list[tuple[Path, dict[str, Any]]]) -> str:
    """Name of the nearest file in which ``key`` is written; of the profile itself if it is in none."""
    for path, layer in layers:
        value: Any = layer
        for part in key:
            known = isinstance(value, Mapping) and part in value
            known = known or (isinstance(value, list) and isinstance(part, int) and part < len(value))
            if not known:
                break
            value = value[part]
        else:
            return path.name
    return layers[0][0].name
