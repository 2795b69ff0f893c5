"""A target profile in words: every field, what it means for a build, and what this machine can do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from toolchain.doctor import TargetState, Tool
from toolchain.target import TargetProfile


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a profile: its dotted key, its value as text, and what it means."""

    key: str
    value: str
    meaning: str


def fields(profile: TargetProfile) -> list[Field]:
    """Every field of ``profile``, in the order of the file format."""
    return list(_fields("", profile))


def build_words(profile: TargetProfile) -> list[str]:
    """What the profile means for a build, in a few sentences."""
    numerics, runtime = profile.numerics, profile.runtime
    scheme = f"{numerics.activation} activations times {numerics.weight} weights"
    scheme += ", a scale per output channel" if numerics.per_channel else ", one scale per weight"
    scheme += ", symmetric" if numerics.symmetric_activation else ", with a zero point for activations"
    return [
        _compile_words(profile),
        f"There is no build of ONNX Runtime for {profile.arch}."
        if "onnxruntime" in profile.without_wheels
        else f"ONNX Runtime engines run with {runtime.execution_provider}.",
        f"Candidates: {', '.join(numerics.precisions)}, by backends {', '.join(runtime.engines)}.",
        "The order of both decides only where nothing is measured.",
        f"int8 uses {scheme}" + (", weights limited to 7 bits." if numerics.reduce_range else "."),
        f"The bundle asks for {profile.os} on {profile.arch}, {runtime.abi.libc} {runtime.abi.min} or newer"
        + (f", and a device that runs {profile.cuda.arch} code." if profile.cuda else "."),
    ]


def execution_words(state: TargetState) -> str:
    """How code for a target is executed here, in a few words: ``native``, or why not."""
    if state.run:
        return f"not on this machine: {state.run[0]}"
    return "native" if not state.measure else f"runs, not measured: {state.measure[0]}"


def machine_words(state: TargetState, missing: list[Tool]) -> list[str]:
    """What this machine can do for a target, one line each."""
    lines = [
        _can("build ONNX Runtime engines", state.onnxruntime),
        _can("build TVM engines", state.tvm),
        _can("run them", state.run),
        _can("measure them", state.measure),
    ]
    return lines + [f"install {tool.name}: {tool.install}" for tool in missing]


def _can(what: str, reasons: tuple[str, ...]) -> str:
    return f"can {what}" if not reasons else f"cannot {what}: {'; '.join(reasons)}"


def _compile_words(profile: TargetProfile) -> str:
    target = profile.tvm.target
    if target.kind == "cuda":
        return f"TVM compiles for CUDA {target.arch}, with nvcc."
    extra = f" with {' '.join(target.mattr)}" if target.mattr else ""
    linker = {
        "cc": "this machine's C compiler",
        "zig": "the lld of the package ziglang",
        "zig-cc": "the C compiler of the package ziglang",
    }
    name = linker.get(profile.tvm.linker, profile.tvm.linker)
    return f"TVM compiles for LLVM's {target.mcpu}{extra} ({target.mtriple}) and links with {name}."


def _fields(prefix: str, model: BaseModel) -> Iterator[Field]:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        key = f"{prefix}{info.alias or name}"
        if isinstance(value, BaseModel):
            yield from _fields(f"{key}.", value)
        else:
            yield Field(key, _text(value), info.description or "")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {_text(v)}" for k, v in value.items()) or "-"
    if isinstance(value, tuple | list | frozenset):
        return ", ".join(map(_text, value)) or "-"
    return str(value)
