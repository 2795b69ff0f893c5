"""The race of one target: what its stages found out, held against the recipe's gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.plan import TargetPlan
from toolchain.plan_engine import Entry
from toolchain.publish import TargetResult, tools_of
from toolchain.recipe import Recipe
from toolchain.report import build_report
from toolchain.runner import Outcome
from toolchain.select import Contender, select


def judge(
    recipe: Recipe,
    target: TargetPlan,
    outcomes: Mapping[str, Outcome],
    given: Mapping[str, Mapping[str, Any] | None] | None,
) -> TargetResult:
    """Run the race of one target.

    Args:
        recipe: has the gates.
        target: the engines that race.
        outcomes: of all stages, by id.
        given: by target, measurements to use instead of those taken; None where they were taken.

    Raises:
        ToolchainError: NOT_REPRODUCIBLE, a given measurement is of another engine.
    """
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
