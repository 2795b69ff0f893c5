"""Turns a recipe and its target profiles into the stages of a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ExitCode
from toolchain.host import Host
from toolchain.keys import installed_version
from toolchain.llvm_cpus import compiled_features
from toolchain.plan_device import add_measure_device
from toolchain.plan_shared import Maker, add_shared_stages, input_specs
from toolchain.plan_static import add_link
from toolchain.programs import emulator_program
from toolchain.quantize.scheme import AccuracyLimits, Scheme
from toolchain.recipe import Recipe
from toolchain.remote.device import Device
from toolchain.runner import Node
from toolchain.stages import (
    compile_ort,
    compile_tvm,
    measure,
    mixed,
    optimize,
    quantize,
    runner,
    verify,
)
from toolchain.target import TargetProfile
from toolchain.tvm.records import Records, load_records
from toolchain.tvm.records import to_json as records_to_json

DEFAULT_K = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine that the plan races: the node ids that make and verify it.

    ``verify`` is "" when it can't be run here; ``unverified`` says why.  ``refused`` says why the plan
    itself offers no such engine.  ``link`` makes what goes into the bundle where that is another file than what was
    compiled.
    """

    precision: str
    backend: str
    compile: str = ""
    verify: str = ""
    unverified: str = ""
    refused: str = ""
    link: str = ""

    @property
    def id(self) -> str:
        return f"{self.precision}/{self.backend}"


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """The part of a plan that belongs to one target.  ``measure`` is "" when ``unmeasured`` says why not."""

    profile: TargetProfile
    entries: tuple[Entry, ...]
    stages: tuple[str, ...]
    measure: str = ""
    unmeasured: str = ""
    runner: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a build, each after its inputs, and what each target makes of them."""

    recipe: Recipe
    nodes: tuple[Node, ...]
    targets: tuple[TargetPlan, ...]


def recipe_records(recipe: Recipe) -> Mapping[str, Records]:
    """Target -> its tuning records, from the file beside the recipe; none if there is no such file."""
    return load_records(recipe.records_path) if recipe.records_path.exists() or recipe.tvm.records else {}


def make_plan(
    recipe: Recipe,
    profiles: Sequence[TargetProfile],
    host: Host,
    measured: bool = True,
    records: Mapping[str, Records] | None = None,
    devices: Mapping[str, Device] | None = None,
) -> Plan:
    """The plan of ``recipe`` for ``profiles``.

    Args:
        recipe: what to build.
        profiles: for which targets, in order.
        host: this machine: engines whose target it satisfies are verified and measured natively.
        measured: False to plan no measurements (they are given, or not wanted).
        records: tuning records by target; those of the recipe's file if not given.
        devices: by target, devices to measure on.
    """
    maker = Maker(recipe, host, measured, recipe_records(recipe) if records is None else records)
    add_shared_stages(maker)
    targets = tuple(_target(maker, profile, (devices or {}).get(profile.name)) for profile in profiles)
    return Plan(recipe, tuple(maker.nodes), targets)


def _target(maker: Maker, profile: TargetProfile, device: Device | None) -> TargetPlan:
    first = len(maker.nodes)
    at = f"@{profile.name}"
    options = optimize.Options(True, input_specs(maker.recipe))
    maker.add(
        f"optimize{at}",
        optimize.STAGE,
        options,
        {"onnx": "export:onnx"},
        failure=ExitCode.OPTIMIZE,
        target=profile.name,
    )
    entries: list[Entry] = []
    for precision in _precisions(maker, profile):
        source, refused = _candidate(maker, profile, precision, at)
        for backend in dict.fromkeys((*profile.runtime.engines, *profile.without_wheels)):
            reason = refused or _unsuited(profile, precision, backend)
            if reason:
                entries.append(Entry(precision, backend, refused=reason))
            else:
                entries.append(_engine(maker, profile, precision, backend, source, at))
    stages = tuple(node.id for node in maker.nodes[first:] if node.stage.name in ("optimize", "quantize", "mixed"))
    on_device = device is not None and maker.measured
    # A static executable is its own runner.
    packed = profile.runtime.runner and profile.kind == "cpu" and profile.runtime.form != "static"
    built = _runner(maker, profile, at) if packed or on_device else ""
    unmeasured = "" if on_device else _why_unmeasured(maker, profile)
    if unmeasured:
        measured = ""
    elif device is not None:
        measured = add_measure_device(maker, profile, device, entries, built)
    else:
        measured = _measure(maker, profile, entries, at)
    return TargetPlan(profile, tuple(entries), stages, measured, unmeasured, built if packed else "")


def _runner(maker: Maker, profile: TargetProfile, at: str) -> str:
    """The stage that builds the edge runtime: to go into the bundles, or to measure on a device with."""
    abi = profile.runtime.abi
    options = runner.Options(profile.arch, f"{abi.libc}:{abi.min}" if abi.min else abi.libc, profile.tvm.linker)
    return maker.add(f"runner{at}", runner.STAGE, options, {}, failure=ExitCode.COMPILE, target=profile.name)


def _unsuited(profile: TargetProfile, precision: str, backend: str) -> str:
    """Why a pair makes no sense on a target's instructions, known before anything is compiled."""
    if backend in profile.without_wheels:
        return f"there is no build of ONNX Runtime for {profile.arch}"
    x86 = profile.kind == "cpu" and profile.arch == "x86_64"
    if x86 and backend == "tvm" and precision == "fp16" and "avx512_fp16" not in profile.cpu.features:
        # LLVM converts every value to float32 and back; the library is slower than the fp32 one.
        return "the target has no fp16 arithmetic (avx512_fp16): TVM would emulate it"
    return ""


def _precisions(maker: Maker, profile: TargetProfile) -> list[str]:
    asked = maker.recipe.quantize.precisions
    return [p for p in profile.numerics.precisions if asked is None or p in asked]


def _scheme(maker: Maker, profile: TargetProfile) -> dict[str, Any]:
    numerics, settings = profile.numerics, maker.recipe.quantize
    own = {f.name: getattr(numerics, f.name) for f in dataclasses.fields(Scheme) if hasattr(numerics, f.name)}
    percentile = {} if settings.percentile is None else {"percentile": settings.percentile}
    return {**own, "method": settings.method, "exclude": tuple(settings.exclude), **percentile}


def _candidate(maker: Maker, profile: TargetProfile, precision: str, at: str) -> tuple[str, str]:
    """The reference of the candidate's model, and why there is none."""
    if precision == "fp32":
        return f"optimize{at}:onnx", ""
    calibrated = maker.recipe.data.calibration is not None
    if precision in ("int8-static", "int8-mixed") and not calibrated:
        return "", "the recipe has no data.calibration"
    inputs = {"onnx": f"optimize{at}:onnx"} | ({"calibration": "calibration:dataset"} if calibrated else {})
    scheme = _scheme(maker, profile)
    if precision == "int8-mixed":
        if maker.recipe.data.evaluation is None:
            return "", "the recipe has no data.evaluation to search on"
        inputs |= {"evaluation": "evaluation:dataset", "reference": "reference:reference"}
        checked = f"verify[int8-static/onnxruntime]{at}"
        if any(node.id == checked for node in maker.nodes):
            # Where plain static int8 holds the gates already, its verdict says so and nothing need be searched.
            inputs["verdict"] = f"{checked}:verdict"
        gates = maker.recipe.gates_for(profile.name)
        limits = AccuracyLimits(**{f.name: getattr(gates, f.name) for f in dataclasses.fields(AccuracyLimits)})
        options: Any = mixed.Options(
            **scheme, **_metric(maker), limits=limits, max_float_layers=maker.recipe.quantize.max_float_layers
        )
        stage = mixed.STAGE
    else:
        options, stage = quantize.Options(**scheme, precision=precision), quantize.STAGE
    name = f"quantize[{precision}]{at}"
    optional = frozenset({"verdict"} & inputs.keys())
    maker.add(name, stage, options, inputs, optional=optional, failure=ExitCode.QUANTIZE, target=profile.name)
    return f"{name}:onnx", ""


def _metric(maker: Maker) -> dict[str, Any]:
    metric = maker.recipe.metric
    if metric is None:
        return {"metric": "", "k": DEFAULT_K, "output": None, "higher_is_better": True}
    kind = maker.path(metric.kind) if ":" in metric.kind else metric.kind
    better = metric.kind != "mae" if metric.higher_is_better is None else metric.higher_is_better
    return {"metric": kind, "k": metric.k or DEFAULT_K, "output": metric.output, "higher_is_better": better}


def _engine(maker: Maker, profile: TargetProfile, precision: str, backend: str, source: str, at: str) -> Entry:
    native = profile.runs_natively_on(maker.host)
    provider = profile.runtime.execution_provider
    name = f"compile[{precision}/{backend}]{at}"
    if backend == "tvm":
        maker.add(
            name,
            compile_tvm.STAGE,
            _tvm_options(maker, profile, precision, native),
            {"onnx": source},
            failure=ExitCode.COMPILE,
            tolerant=True,
            target=profile.name,
            extra={"host": maker.host.cpu_model} if native else {},
        )
        if not native and profile.kind != "cpu":
            return Entry(precision, backend, name, unverified=_why_not_here(profile, maker.host))
    else:
        device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
        options = compile_ort.Options(provider, device, precision)
        maker.add(name, compile_ort.STAGE, options, {"onnx": source}, failure=ExitCode.COMPILE, target=profile.name)
    native = native and _has_provider(provider)
    checked = f"verify[{precision}/{backend}]{at}"
    options_ = verify.Options(
        **_metric(maker),
        evidence="native" if native else "proxy",
        provider=provider if native else "CPUExecutionProvider",
    )
    # Code that can't run here is judged by its twin: the same rules, compiled for this machine.
    judged = "twin" if backend == "tvm" and not native else "engine"
    inputs = {"engine": f"{name}:{judged}", "evaluation": "evaluation:dataset", "reference": "reference:reference"}
    own = ".py:" in options_.metric
    stage = dataclasses.replace(verify.STAGE, user_code=True) if own else verify.STAGE
    # Kernels are chosen by the processor, and so may the last bits of the outputs be.
    extra = {"host": maker.host.cpu_model}
    maker.add(
        checked, stage, options_, inputs, failure=ExitCode.COMPILE, tolerant=True, target=profile.name, extra=extra
    )
    linked = add_link(maker, profile, name, checked) if backend == "tvm" and profile.runtime.form == "static" else ""
    return Entry(precision, backend, name, checked, link=linked)


def _tvm_options(maker: Maker, profile: TargetProfile, precision: str, native: bool) -> compile_tvm.Options:
    records = maker.records.get(profile.name, {}) if precision == "fp32" else {}
    return compile_tvm.Options(
        target=profile.tvm_target(),
        kind=profile.kind,
        arch=profile.arch,
        native=native,
        vector_bits=profile.cpu.vector_bits,
        registers=profile.cpu.registers,
        linker=profile.tvm.linker,
        libc_min=profile.runtime.abi.min,
        precision=precision,
        l1d_kib=profile.cpu.l1d_kib,
        proxy="" if native else _proxy(maker.host),
        records=records_to_json(records),
        records_file=maker.path(maker.recipe.records_file) if records else "",
        form=profile.runtime.form,
        **({} if native or profile.kind != "cpu" else _emulator(profile)),
    )


def _emulator(profile: TargetProfile) -> dict[str, str]:
    """What runs the target's code here, if its profile says which processor to be and QEMU is on PATH."""
    program = emulator_program(profile.arch) if profile.execute.qemu_cpu else ""
    return {"emulator": program, "emulator_cpu": profile.execute.qemu_cpu if program else ""}


def _proxy(host: Host) -> str:
    """The level of x86-64 whose code stands in for code that this machine can't run.

    Without vectors of 256 bits and fp16 conversions, checking a model for another processor takes minutes.
    """
    level = "x86-64-v3"
    return level if host.arch == "x86_64" and compiled_features("x86_64", level) <= host.cpu_features else ""


def _has_provider(provider: str) -> bool:
    return provider == "CPUExecutionProvider" or installed_version("onnxruntime-gpu") != "not installed"


def _why_not_here(profile: TargetProfile, host: Host) -> str:
    from toolchain.host import incompatibilities

    if profile.execute.how == "none":
        return "the profile says execute.how = 'none'"
    if profile.execute.how == "remote":
        return "the profile says execute.how = 'remote', and no device was given (--device)"
    return "; ".join(incompatibilities(profile.requirements(), host))


def _why_unmeasured(maker: Maker, profile: TargetProfile) -> str:
    if not profile.runs_natively_on(maker.host):
        return _why_not_here(profile, maker.host)
    provider = profile.runtime.execution_provider
    if not _has_provider(provider):
        return f"ONNX Runtime here has no {provider}"
    return "" if maker.measured else "measuring was switched off"


def _measure(maker: Maker, profile: TargetProfile, entries: Sequence[Entry], at: str) -> str:
    settings, host = maker.recipe.measure, maker.host
    cores = profile.cpu.cores
    threads = settings.threads or (min(cores, host.cores) if cores else 0)
    options = measure.Options(
        dict(settings.shapes),
        settings.runs,
        settings.warmup,
        settings.max_seconds,
        threads,
        profile.runtime.execution_provider,
    )
    made = {entry.id: f"{entry.compile}:engine" for entry in entries if entry.compile}
    return maker.add(
        f"measure{at}",
        measure.STAGE,
        options,
        {"evaluation": "evaluation:dataset", **made},
        optional=frozenset(made),
        failure=ExitCode.MEASURE,
        target=profile.name,
        extra={"cpu_model": host.cpu_model, "cores": host.cores, "memory_mb": host.memory_mb},
    )
