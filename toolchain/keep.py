"""Building some targets of a recipe: what becomes of the bundles that the standing release holds for the others.

A bundle stays if a build of its target would run nothing: every stage comes from the cache, and the measurements are
those that the bundle carries, of the very same engines.  So the release is what a build of all targets would make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolchain.bundle.read import BundleRef, Release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.execute import Forecast, forecast
from toolchain.host import Host
from toolchain.plan import TargetPlan, make_plan
from toolchain.recipe import Recipe
from toolchain.runner import Runner
from toolchain.target import TargetProfile

_SHOWN = 3
"""Reasons told for each target; the others are the consequences of these more often than not."""


@dataclass(frozen=True, slots=True)
class Others:
    """The targets of the standing release that a build was not asked for.

    Attributes:
        kept: target -> its measurement, empty without one: its bundle is up to date and stays.
        stale: target of the recipe -> why its bundle is not up to date.
    """

    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stale: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def refuse_loss(self, release: Release) -> None:
        """Raises:
        ToolchainError: USAGE, the release would lose a target.
        """
        if not self.stale:
            return
        names = ", ".join(self.stale)
        many = len(self.stale) > 1
        raise ToolchainError(
            f"--target would take {'bundles' if many else 'the bundle'} for {names} out of this release: "
            f"{'they are' if many else 'it is'} not up to date",
            where=str(release.path),
            details=list(dict.fromkeys(reason for reasons in self.stale.values() for reason in reasons)),
            hint=f"build without --target, or with --target for {names} too; give the recipe a new version, or another "
            "--output; or --partial to write the release without them",
            code=ExitCode.USAGE,
        )


def find_others(
    recipe: Recipe, profiles: Sequence[TargetProfile], named: Sequence[str], release: Release | None, runner: Runner,
    host: Host,
) -> Others:  # fmt: skip
    """What becomes of the bundles of ``release`` when the targets ``named`` are built; all of them are if none is.

    Args:
        recipe: of the build.
        profiles: all of the recipe's targets.
        named: targets to build.
        release: what stands where the new release goes.
        runner: looks stages up in the cache; runs none.
        host: this machine.
    """
    if release is None or not named:
        return Others()
    others = [p for p in profiles if p.name not in named and release.bundle(p.name) is not None]
    if not others:
        return Others()
    plan = make_plan(recipe, others, host, measured=False)
    found = forecast(plan.nodes, runner)
    kept: dict[str, Mapping[str, Any]] = {}
    stale: dict[str, tuple[str, ...]] = {}
    for target in plan.targets:
        name = target.profile.name
        bundle = release.bundle(name)
        assert bundle is not None
        measurement = _measurement(bundle)
        own = [f for f in found if f.node.target in ("", name)]
        if reasons := _stale(own) or _other_engines(target, measurement, own):
            stale[name] = reasons
        else:
            kept[name] = measurement
    return Others(kept, stale)


def _stale(found: Sequence[Forecast]) -> tuple[str, ...]:
    reasons = [f"{f.node.id}: {'; '.join(f.reasons)}" for f in found if f.state == "run"]
    more = len(reasons) - _SHOWN
    return (*reasons[:_SHOWN], *([f"and {more} more stage{'s' * (more > 1)}"] if more > 0 else []))


def _measurement(bundle: BundleRef) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(bundle.read("measurement.json")) if "measurement.json" in bundle.files else {}
    return found


def _other_engines(target: TargetPlan, measurement: Mapping[str, Any], found: Sequence[Forecast]) -> tuple[str, ...]:
    digests: Mapping[str, str] = measurement.get("digests") or {}
    outputs = {f.node.id: f.outcome.outputs for f in found if f.outcome is not None}
    for entry in target.entries:
        engine = outputs[entry.compile].get("engine") if entry.compile else None
        if engine is not None and digests.get(entry.id) not in (None, engine.digest):
            return (f"{target.profile.name}: its measurements are of another {entry.id} engine",)
    return ()
