"""recipe x targets -> plan -> run -> select under the gates -> release: the whole pipeline in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.cache import Cache, default_folder, default_limit
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.execute import Forecast, Listener, Silent, execute, forecast
from toolchain.host import detect_host
from toolchain.plan import Entry, Plan, TargetPlan, make_plan
from toolchain.plan_device import find_devices
from toolchain.publish import TargetResult, publish, replacement_notes, standing_release, tools_of
from toolchain.recipe import Recipe, load_recipe
from toolchain.remote.address import parse_devices
from toolchain.report import build_report
from toolchain.runner import Outcome, Runner
from toolchain.select import Contender, select
from toolchain.target import TargetProfile, load_target

DEFAULT_OUTPUT = Path("artifacts")


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build made.

    Attributes:
        code: OK when every gate of every target held; then ``release`` is the folder of the release.
        digest: of the release's index.
        unchanged: the folder held exactly this release already.
        outcomes: every stage by its id.
    """

    recipe: Recipe
    targets: tuple[TargetResult, ...]
    outcomes: Mapping[str, Outcome]
    code: ExitCode
    release: Path | None = None
    digest: str = ""
    unchanged: bool = False
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Machine-readable: what was built, per target the whole report, and what each stage did."""
        return {
            "name": self.recipe.name,
            "version": self.recipe.version,
            "exit_code": int(self.code),
            "outcome": self.code.name.lower(),
            "release": str(self.release) if self.release else None,
            "digest": self.digest or None,
            "unchanged": self.unchanged,
            "targets": {r.target: r.report for r in self.targets},
            "failures": {r.target: list(r.selection.failures) for r in self.targets if r.selection.code},
            "stages": [
                {
                    "id": o.node.id,
                    "status": o.status,
                    "refused": o.refused,
                    "seconds": round(o.seconds, 3),
                    "cpu_seconds": round(o.cpu_seconds, 3),
                }
                for o in self.outcomes.values()
            ],
            "notes": list(self.notes),
        }


def plan(
    recipe: Path | str,
    *,
    targets: Sequence[str] = (),
    cache: Path | None = None,
    measure: bool = True,
    devices: Sequence[str] = (),
) -> list[Forecast]:
    """What :func:`build` would do, stage by stage, without running anything; devices are asked what they are.

    Raises:
        ToolchainError: BAD_RECIPE, BAD_TARGET; DEVICE, INCOMPATIBLE_HOST.
    """
    loaded, made = _prepare(recipe, targets, measure, devices)
    store = open_cache(cache)
    runner = Runner(store, loaded.root.absolute(), loaded.name)
    try:
        return forecast(made.nodes, runner)
    finally:
        runner.pool.close()
        store.save_digests()


def build(
    recipe: Path | str,
    *,
    targets: Sequence[str] = (),
    output: Path = DEFAULT_OUTPUT,
    cache: Path | None = None,
    jobs: int | None = None,
    dump_ir: Path | None = None,
    measure: bool = True,
    measurements: Mapping[str, Mapping[str, Any]] | None = None,
    listener: Listener | None = None,
    devices: Sequence[str] = (),
) -> BuildResult:
    """Build a recipe into a release at ``output/NAME/VERSION``.

    Args:
        recipe: path of the recipe.
        targets: names of the recipe's targets to build; all of them if empty.
        output: folder of releases.
        cache: folder of the stage cache; the user's if not given.
        jobs: stages at once; the number of cores if not given.
        dump_ir: folder for TVM's IR after every phase.
        measure: False skips the measurements; gates on them then fail, unless the recipe allows it.
        measurements: by target, measurements to use instead of taking new ones (to reproduce a release).
        listener: gets the events of the build.
        devices: ``TARGET=[user@]host[:port]`` each: the target's engines are measured there, over SSH.

    Returns:
        The result.  When a gate failed its ``code`` says which kind, and no release was written.

    Raises:
        ToolchainError: anything but a gate stopped the build.
    """
    loaded, made = _prepare(recipe, targets, measure and measurements is None, devices)
    store = open_cache(cache)
    runner = Runner(store, loaded.root.absolute(), loaded.name, dump_ir.absolute() if dump_ir else None)
    with store.in_use():
        try:
            cores = len(os.sched_getaffinity(0))
            outcomes = execute(made.nodes, runner, jobs or cores, listener or Silent())
        finally:
            runner.pool.close()
            store.save_digests()
        results = tuple(_judge(loaded, target, outcomes, measurements) for target in made.targets)
        code = next((r.selection.code for r in results if r.selection.code), ExitCode.OK)
        if code:
            return BuildResult(loaded, results, outcomes, code)
        before = standing_release(loaded, output)
        packed = publish(loaded, results, outcomes, store, output)
    notes = (*replacement_notes(before, packed), *_keep_bounded(store))
    return BuildResult(loaded, results, outcomes, code, packed.folder, packed.digest, packed.unchanged, notes)


def _prepare(recipe: Path | str, targets: Sequence[str], measure: bool, devices: Sequence[str]) -> tuple[Recipe, Plan]:
    loaded = load_recipe(Path(recipe).absolute())
    given = parse_devices(devices)
    profiles = chosen_targets(loaded, [load_target(t, loaded.folder) for t in loaded.targets], targets)
    # Before anything is compiled: a device that can't be used is known at once.
    found = find_devices(profiles, given) if measure else {}
    return loaded, make_plan(loaded, profiles, detect_host(), measure, devices=found)


def chosen_targets(recipe: Recipe, profiles: Sequence[TargetProfile], names: Iterable[str]) -> list[TargetProfile]:
    """The profiles that are named, all if none is.

    Raises:
        ToolchainError: BAD_TARGET.
    """
    by_name = {profile.name: profile for profile in profiles}
    for name in names:
        if name not in by_name:
            raise ToolchainError(
                f"got {name!r}; allowed: {', '.join(by_name)}{did_you_mean(name, by_name)}",
                where=f"--target, {recipe.path.name}: targets",
                hint="add the target to the recipe's targets, or choose one of them",
                code=ExitCode.BAD_TARGET,
            )
    return [p for p in profiles if not names or p.name in set(names)]


def open_cache(folder: Path | None) -> Cache:
    """The stage cache, the user's if no folder is given."""
    return Cache(folder or default_folder(), default_limit())


def _judge(
    recipe: Recipe,
    target: TargetPlan,
    outcomes: Mapping[str, Outcome],
    given: Mapping[str, Mapping[str, Any]] | None,
) -> TargetResult:
    profile = target.profile
    measurement: Mapping[str, Any] | None = None
    unmeasured = target.unmeasured
    if given is not None:
        measurement = given.get(profile.name)
    elif target.measure:
        outcome = outcomes[target.measure]
        measurement, unmeasured = outcome.facts or None, outcome.refused
    if measurement is not None:
        _check_measured(target, measurement, outcomes)
    contenders = [_contender(entry, outcomes, measurement) for entry in target.entries]
    selection = select(
        contenders,
        recipe.gates_for(profile.name),
        profile.numerics.precisions,
        profile.runtime.engines,
        recipe.quantize.require,
    )
    stages = {
        node.split("@")[0]: {**outcomes[node].facts, **({"refused": r} if (r := outcomes[node].refused) else {})}
        for node in ("export", *target.stages, *(e.compile for e in target.entries if e.compile))
    }
    report = build_report(
        name=recipe.name,
        version=recipe.version,
        target=profile.name,
        selection=selection,
        stages=stages,
        measurement=measurement,
        unmeasured=unmeasured,
        tools=tools_of(o for o in outcomes.values() if o.node.target in ("", profile.name)),
    )
    return TargetResult(target, selection, report, measurement)


def _contender(entry: Entry, outcomes: Mapping[str, Outcome], measurement: Mapping[str, Any] | None) -> Contender:
    if entry.refused:
        return Contender(entry.precision, entry.backend, refused=entry.refused)
    compiled = outcomes[entry.compile]
    if compiled.refused:
        return Contender(entry.precision, entry.backend, refused=compiled.refused)
    packed = outcomes[entry.link] if entry.link and not outcomes[entry.link].refused else compiled
    size = sum(f.size for f in packed.outputs["engine"].files)
    row = (measurement or {}).get("engines", {}).get(entry.id)
    unmeasured = (measurement or {}).get("unmeasured", {}).get(entry.id, "")
    verdict, unverified = None, entry.unverified
    if entry.verify:
        outcome = outcomes[entry.verify]
        verdict, unverified = outcome.facts or None, outcome.refused
    if row and "error" in row:
        return Contender(entry.precision, entry.backend, size, None, None, "", f"did not run: {row['error']}")
    if row and "rejected" in row and verdict:
        verdict = {**verdict, "problem": verdict.get("problem") or row["rejected"]}
    return Contender(entry.precision, entry.backend, size, verdict, row, "", unverified, unmeasured)


def _check_measured(target: TargetPlan, measurement: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Given measurements must be of exactly the engines at hand."""
    digests = measurement.get("digests")
    if digests is None:
        return
    for entry in target.entries:
        made = outcomes[entry.compile].outputs.get("engine") if entry.compile else None
        if made is not None and digests.get(entry.id) not in (None, made.digest):
            raise ToolchainError(
                f"the given measurement is of another {entry.id} engine than the one built here",
                where=target.profile.name,
                hint="measure anew, or find out why the engine differs",
                code=ExitCode.NOT_REPRODUCIBLE,
            )


def _keep_bounded(store: Cache) -> tuple[str, ...]:
    if store.size()["bytes"] <= store.limit:
        return ()
    pruned = store.prune(store.limit)
    if pruned is None:
        return ("the cache is above its limit, but another build is using it: not pruned",)
    return (f"pruned the cache: freed {pruned['freed_bytes'] / 1e6:.0f} MB",)
