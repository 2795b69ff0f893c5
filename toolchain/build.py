"""recipe x targets -> plan -> run -> select under the gates -> release: the whole pipeline in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.bundle.read import Release
from toolchain.cache import Cache, default_folder, default_limit
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.execute import Forecast, Listener, Silent, execute, forecast
from toolchain.host import detect_host
from toolchain.judge import judge
from toolchain.keep import Others, find_others
from toolchain.plan import Plan, make_plan
from toolchain.plan_device import find_devices
from toolchain.publish import TargetResult, publish, replacement_notes, standing_release
from toolchain.recipe import Recipe, load_recipe
from toolchain.remote.address import parse_devices
from toolchain.runner import Outcome, Runner
from toolchain.storage import check_can_be_made
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
        kept: targets that were not asked for, whose bundles stay in the release as they are up to date.
        dropped: targets whose bundles are no longer in the release that stood there.
    """

    recipe: Recipe
    targets: tuple[TargetResult, ...]
    outcomes: Mapping[str, Outcome]
    code: ExitCode
    release: Path | None = None
    digest: str = ""
    unchanged: bool = False
    notes: tuple[str, ...] = field(default=())
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

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
            "kept": list(self.kept),
            "dropped": list(self.dropped),
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
    output: Path | None = None,
    partial: bool = False,
) -> list[Forecast]:
    """What :func:`build` would do, stage by stage, without running anything; devices are asked what they are.

    The bundles of other targets are looked at if ``output`` is given.

    Raises:
        ToolchainError: BAD_RECIPE, BAD_TARGET; DEVICE, INCOMPATIBLE_HOST; USAGE as :func:`build`.
    """
    store = open_cache(cache)
    loaded = load_recipe(Path(recipe).absolute())
    runner = Runner(store, loaded.root.absolute(), loaded.name)
    try:
        job = _prepare(loaded, targets, measure, devices, runner, output, partial)
        return forecast(job.plan.nodes, runner)
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
    partial: bool = False,
) -> BuildResult:
    """Build a recipe into a release at ``output/NAME/VERSION``.

    Args:
        recipe: path of the recipe.
        targets: names of the recipe's targets to build; all of them if empty.  Bundles that the release holds for the
            recipe's other targets stay in it if they are up to date.
        output: folder of releases.
        cache: folder of the stage cache; the user's if not given.
        jobs: stages at once; the number of cores if not given.
        dump_ir: folder for TVM's IR after every phase.
        measure: False skips the measurements; gates on them then fail, unless the recipe allows it.
        measurements: by target, measurements to use instead of taking new ones (to reproduce a release).
        listener: gets the events of the build.
        devices: ``TARGET=[user@]host[:port]`` each: the target's engines are measured there, over SSH.
        partial: bundles of other targets that are not up to date may leave the release.

    Returns:
        The result.  When a gate failed its ``code`` says which kind, and no release was written.

    Raises:
        ToolchainError: anything but a gate stopped the build; USAGE, the release that stands there would lose a target.
    """
    store = open_cache(cache)
    loaded = load_recipe(Path(recipe).absolute())
    # Not after minutes of work.
    check_can_be_made(output.absolute() / loaded.name / loaded.version, "another --output folder")
    runner = Runner(store, loaded.root.absolute(), loaded.name, dump_ir.absolute() if dump_ir else None)
    with store.in_use():
        try:
            job = _prepare(loaded, targets, measure and measurements is None, devices, runner, output, partial)
            cores = len(os.sched_getaffinity(0))
            outcomes = execute(job.plan.nodes, runner, jobs or cores, listener or Silent())
        finally:
            runner.pool.close()
            store.save_digests()
        kept = job.others.kept
        given = {name: (measurements or {}).get(name) or kept[name] or None for name in kept}
        results = tuple(
            judge(loaded, target, outcomes, given if target.profile.name in kept else measurements)
            for target in job.plan.targets
        )
        code = next((r.selection.code for r in results if r.selection.code), ExitCode.OK)
        if code:
            return BuildResult(loaded, results, outcomes, code, kept=tuple(kept))
        packed = publish(loaded, results, outcomes, store, output)
    dropped = tuple(sorted({b.target for b in job.before.bundles} - packed.bundles.keys())) if job.before else ()
    notes = (*replacement_notes(job.before, packed), *_keep_bounded(store))
    return BuildResult(
        loaded, results, outcomes, code, packed.folder, packed.digest, packed.unchanged, notes, tuple(kept), dropped
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What a build sets out to do; ``before``: the release that stands where the new one goes."""

    plan: Plan
    before: Release | None
    others: Others


def _prepare(
    loaded: Recipe,
    targets: Sequence[str],
    measure: bool,
    devices: Sequence[str],
    runner: Runner,
    output: Path | None,
    partial: bool,
) -> _Job:
    given = parse_devices(devices)
    profiles = [load_target(t, loaded.folder) for t in loaded.targets]
    chosen = chosen_targets(loaded, profiles, targets)
    host = detect_host()
    before = standing_release(loaded, output) if output is not None else None
    others = find_others(loaded, profiles, targets, before, runner, host)
    if before is not None and not partial:
        others.refuse_loss(before)
    # Before anything is compiled: a device that can't be used is known at once.
    found = find_devices(chosen, given) if measure else {}
    built = [p for p in profiles if p in chosen or p.name in others.kept]
    return _Job(make_plan(loaded, built, host, measure, devices=found, kept=others.kept), before, others)


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


def _keep_bounded(store: Cache) -> tuple[str, ...]:
    if store.size()["bytes"] <= store.limit:
        return ()
    pruned = store.prune(store.limit)
    if pruned is None:
        return ("the cache is above its limit, but another build is using it: not pruned",)
    return (f"pruned the cache: freed {pruned['freed_bytes'] / 1e6:.0f} MB",)
