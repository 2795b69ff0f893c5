"""Turns a recipe and its target profiles into the stages of a build."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from toolchain.errors import ExitCode
from toolchain.host import Host
from toolchain.plan_candidate import add_candidate, precisions_of
from toolchain.plan_device import add_measure_device
from toolchain.plan_engine import Entry, add_engine, has_provider, unsuited, why_not_here
from toolchain.plan_shared import Maker, add_shared_stages, input_specs
from toolchain.recipe import Recipe
from toolchain.remote.device import Device
from toolchain.runner import Node
from toolchain.runtime.edge.tvm_libraries import tvm_libraries
from toolchain.stages import measure, optimize, runner
from toolchain.target import TargetProfile
from toolchain.tvm.records import Records, load_records


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
    kept: Collection[str] = (),
) -> Plan:
    """The plan of ``recipe`` for ``profiles``.

    Args:
        recipe: what to build.
        profiles: for which targets, in order.
        host: this machine: engines whose target it satisfies are verified and measured natively.
        measured: False to plan no measurements (they are given, or not wanted).
        records: tuning records by target; those of the recipe's file if not given.
        devices: by target, devices to measure on.
        kept: targets that are not measured whatever ``measured`` says: a release holds their measurements.
    """
    maker = Maker(recipe, host, recipe_records(recipe) if records is None else records)
    add_shared_stages(maker)
    targets = tuple(
        _target(maker, profile, (devices or {}).get(profile.name), measured and profile.name not in kept)
        for profile in profiles
    )
    return Plan(recipe, tuple(maker.nodes), targets)


def _target(maker: Maker, profile: TargetProfile, device: Device | None, measured: bool) -> TargetPlan:
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
    for precision in precisions_of(maker, profile):
        source, refused = add_candidate(maker, profile, precision, at)
        for backend in dict.fromkeys((*profile.runtime.engines, *profile.without_wheels)):
            reason = refused or unsuited(profile, precision, backend)
            if reason:
                entries.append(Entry(precision, backend, refused=reason))
            else:
                entries.append(add_engine(maker, profile, precision, backend, source, at))
    stages = tuple(node.id for node in maker.nodes[first:] if node.stage.name in ("optimize", "quantize", "mixed"))
    on_device = device is not None and measured
    # A static executable is its own runner.
    packed = profile.runtime.runner and profile.kind == "cpu" and profile.runtime.form != "static"
    built = _runner(maker, profile, at) if packed or on_device else ""
    unmeasured = "" if on_device else _why_unmeasured(maker, profile, measured)
    if unmeasured:
        figures = ""
    elif device is not None:
        figures = add_measure_device(maker, profile, device, entries, built)
    else:
        figures = _measure(maker, profile, entries, at)
    return TargetPlan(profile, tuple(entries), stages, figures, unmeasured, built if packed else "")


def _runner(maker: Maker, profile: TargetProfile, at: str) -> str:
    """The stage that builds the edge runtime: to go into the bundles, or to measure on a device with."""
    if profile.tvm_packages is not None:
        tvm_libraries(profile.arch, profile.tvm_packages)  # what is wrong with them is told before anything is built
    abi = profile.runtime.abi
    options = runner.Options(profile.arch, f"{abi.libc}:{abi.min}" if abi.min else abi.libc, profile.tvm.linker)
    return maker.add(f"runner{at}", runner.STAGE, options, {}, failure=ExitCode.COMPILE, target=profile.name)


def _why_unmeasured(maker: Maker, profile: TargetProfile, measured: bool) -> str:
    if not profile.runs_natively_on(maker.host):
        return why_not_here(profile, maker.host)
    provider = profile.runtime.execution_provider
    if not has_provider(provider):
        return f"ONNX Runtime here has no {provider}"
    return "" if measured else "measuring was switched off"


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
