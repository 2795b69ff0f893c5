"""The typed form of ``bundle.json``: what a bundle is, what it needs, and what is known about it.

``bundle.json`` is canonical JSON.  A reader refuses a file with a newer ``schema``; keys that it does not know
within its own schema are mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.artifact import canonical_json
from toolchain.bundle.check import damaged, parse_json
from toolchain.bundle.names import unsafe_name
from toolchain.errors import ExitCode, ToolchainError, did_you_mean

SCHEMA = 1
BACKENDS = ("onnxruntime", "tvm")
FORMS = ("aot", "vm", "static")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine file, and the sizes of named dimensions that it was compiled for; no sizes: dynamic."""

    file: str
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs: backend ``onnxruntime`` or ``tvm``, precision, device ``cpu`` or ``cuda``, variants.

    ``form`` of a TVM engine: ``aot`` needs no run-time, ``vm`` needs TVM's, ``static`` is a program; "" for ONNX
    Runtime.
    """

    backend: str
    precision: str
    device: str
    variants: tuple[Variant, ...]
    form: str = ""


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The target profile that the bundle was made for: its name and the whole profile as JSON."""

    name: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RuntimeNeed:
    """What must be installed: a distribution, its versions (PEP 440, e.g. ``>=1.18,<2``) and the provider.

    ``provider`` is an ONNX Runtime execution provider, e.g. ``CPUExecutionProvider``; empty for TVM.
    """

    distribution: str
    versions: str
    provider: str = ""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far the outputs of the self-test may lie from the recorded ones; None: not checked.

    ``cosine`` is the least allowed cosine similarity of an output, ``max_abs_error`` the largest absolute error.
    """

    cosine: float | None = None
    max_abs_error: float | None = None

    @classmethod
    def around(cls, worst: Mapping[str, float | None]) -> Tolerance:
        """As near to the original as verification came at its worst, with room for another processor."""
        cosine, error = worst.get("cosine"), worst.get("max_abs_error")
        return cls(None if cosine is None else cosine - 0.01, None if error is None else 2.0 * error + 1e-4)


@dataclass(frozen=True, slots=True)
class BundleManifest:
    """What ``bundle.json`` holds.

    Attributes:
        requirements: what the machine must have, as ``TargetProfile.requirements()`` gives it.
        contract: the content of ``contract.json``: inputs, outputs, dimensions.
        evidence: summary of what was verified and measured, JSON.
        tools: distribution -> version of everything that took part in the build.
        reasons: why this engine was selected, a sentence each.
        selftest: tolerances for ``selftest.npz``, when there is one.
    """

    name: str
    version: str
    target: TargetInfo
    requirements: Mapping[str, Any]
    engine: EngineInfo
    runtime: RuntimeNeed
    contract: Mapping[str, Any]
    description: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    selftest: Tolerance | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_bytes(self) -> bytes:
        """Canonical JSON: the content of ``bundle.json``."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, where: Path | str) -> BundleManifest:
        """Parse ``bundle.json``.

        Raises:
            ToolchainError: DAMAGED_BUNDLE, not of this form; INCOMPATIBLE_HOST, made for a newer schema.
        """
        reader = _Reader(parse_json(data, where), where)
        check_schema(reader.data.get("schema"), SCHEMA, where)
        reader.only({f.name for f in dataclasses.fields(cls)})
        target, runtime = reader.object("target"), reader.object("runtime")
        manifest = cls(
            schema=SCHEMA,
            name=reader.string("name"),
            version=reader.string("version"),
            description=reader.string("description"),
            target=TargetInfo(target.string("name"), target.object("profile").data),
            requirements=_requirements(reader.object("requirements")),
            engine=parse_engine(reader.object("engine").data, where),
            runtime=RuntimeNeed(runtime.string("distribution"), runtime.string("versions"), runtime.string("provider")),
            contract=reader.object("contract").data,
            evidence=reader.object("evidence").data,
            tools=reader.strings("tools"),
            reasons=reader.string_list("reasons"),
            selftest=_tolerance(reader),
        )
        target.only({"name", "profile"})
        runtime.only({"distribution", "versions", "provider"})
        return manifest


def check_schema(got: object, understood: int, where: Path | str) -> None:
    """Refuse a file whose ``schema`` is newer than ``understood``, or no schema at all.

    Raises:
        ToolchainError: INCOMPATIBLE_HOST, newer; DAMAGED_BUNDLE, not a positive number.
    """
    if type(got) is not int or got < 1:
        raise damaged(f"schema must be a number from 1 to {understood}, got {got!r}", where)
    if got > understood:
        raise ToolchainError(
            f"is made for schema {got}, this version of toolchain understands up to {understood}",
            where=str(where),
            hint="upgrade toolchain: pip install --upgrade toolchain",
            code=ExitCode.INCOMPATIBLE_HOST,
        )


def parse_engine(data: Mapping[str, Any], where: Path | str) -> EngineInfo:
    """The engine section of ``bundle.json``, or the content of ``engine.json`` (which may hold more keys).

    Raises:
        ToolchainError: DAMAGED_BUNDLE.
    """
    reader = _Reader(data, where)
    variants = data.get("variants")
    if not isinstance(variants, list) or not variants:
        raise damaged("engine variants must be a list with at least one entry", where)
    return EngineInfo(
        reader.choice("backend", BACKENDS),
        reader.string("precision"),
        reader.choice("device", DEVICES),
        tuple(_variant(v, where) for v in variants),
        _form(reader),
    )


def _form(reader: _Reader) -> str:
    """Of a TVM engine; bundles made before there were two forms name none."""
    if reader.data.get("backend") != "tvm":
        return ""
    return reader.choice("form", FORMS) if reader.data.get("form") else "vm"


def _variant(data: object, where: Path | str) -> Variant:
    if not isinstance(data, dict):
        raise damaged("an engine variant must be an object with file and sizes", where)
    file, sizes = data.get("file"), data.get("sizes", {})
    if not isinstance(file, str) or unsafe_name(file):
        raise damaged(f"the file of an engine variant must be a name inside the bundle, got {file!r}", where)
    if not isinstance(sizes, dict) or not all(type(v) is int and v >= 1 for v in sizes.values()):
        raise damaged(f"the sizes of engine variant {file} must be whole numbers from 1, got {sizes!r}", where)
    return Variant(file, sizes)


def _requirements(reader: _Reader) -> Mapping[str, Any]:
    """Requirements in the form that :func:`toolchain.host.incompatibilities` relies on."""
    reader.string("os")
    reader.string("arch")
    reader.string_list("cpu_features")
    if reader.data.get("cuda_arch") is not None:
        reader.string("cuda_arch")
    if reader.data.get("libc") is not None:
        libc = reader.object("libc")
        libc.string("name")
        libc.string("min")
    return reader.data


def _tolerance(reader: _Reader) -> Tolerance | None:
    if reader.data.get("selftest") is None:
        return None
    part = reader.object("selftest")
    part.only({f.name for f in dataclasses.fields(Tolerance)})
    for key, value in part.data.items():
        if value is not None and type(value) not in (int, float):
            raise damaged(f"selftest.{key} must be a number or null, got {value!r}", reader.where)
    return Tolerance(part.data.get("cosine"), part.data.get("max_abs_error"))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes typed values out of parsed JSON; a wrong type is a damaged bundle."""

    data: Mapping[str, Any]
    where: Path | str

    def string(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str):
            raise damaged(f"{key!r} must be a string, got {value!r}", self.where)
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.string(key)
        if value not in allowed:
            raise damaged(f"{key!r} must be one of {', '.join(allowed)}, got {value!r}", self.where)
        return value

    def object(self, key: str) -> _Reader:
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise damaged(f"{key!r} must be an object, got {value!r}", self.where)
        return _Reader(value, self.where)

    def strings(self, key: str) -> dict[str, str]:
        value = dict(self.object(key).data)
        if not all(isinstance(v, str) for v in value.values()):
            raise damaged(f"{key!r} must be an object of strings", self.where)
        return value

    def string_list(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise damaged(f"{key!r} must be a list of strings, got {value!r}", self.where)
        return tuple(value)

    def only(self, allowed: set[str]) -> None:
        for key in self.data:
            if key not in allowed:
                raise damaged(f"unknown key {key!r}{did_you_mean(key, allowed)}", self.where)
