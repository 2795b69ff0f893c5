"""Chooses the engine of a bundle: the fastest one that holds every gate, with the reasons in words.

A pure function of verdicts, measurements, gates and the profile's preferences: the same figures give
the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode
from toolchain.figures import apart

if TYPE_CHECKING:
    from toolchain.recipe import Gates


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine in the race.

    Attributes:
        precision, backend: e.g. ``"int8-static"``, ``"onnxruntime"``.
        size: bytes of the engine's files.
        verdict: facts of the verify stage, or None when it could not be run here.
        measurement: this engine's row of the measure stage, or None.
        refused: why there is no such engine; empty when there is one.
        unverified: why there is no verdict.
        unmeasured: why there are no figures where others of the target have some.
    """

    precision: str
    backend: str
    size: int = 0
    verdict: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    refused: str = ""
    unverified: str = ""
    unmeasured: str = ""

    @property
    def id(self) -> str:
        return f"{self.precision}/{self.backend}"

    @property
    def median_ms(self) -> float | None:
        """Milliseconds, or None when not measured (or measured as something that is no time)."""
        value = (self.measurement or {}).get("median_ms")
        return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate applied to one engine.  ``got`` is None when the figure does not exist; then ``held`` is
    False, or True if the recipe allows unmeasured figures (``note`` says so).
    """

    gate: str
    kind: ExitCode
    limit: float
    got: float | None
    held: bool
    note: str = ""

    def describe(self) -> str:
        got, limit = ("not measured", f"{self.limit:g}") if self.got is None else apart(self.got, self.limit)
        return f"{self.gate}: got {got}, limit {limit}" + (f" ({self.note})" if self.note else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "gate": self.gate,
            "kind": self.kind.name.lower(),
            "limit": self.limit,
            "got": self.got,
            "held": self.held,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the race: the contender, its gates and what became of it.

    ``state``: ``"chosen"``, ``"passed"`` (slower, or later in the order of preference), ``"rejected"``
    (a gate) or ``"not offered"``.
    """

    contender: Contender
    gates: tuple[GateResult, ...]
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of the race for one target.

    ``code`` is OK with a chosen contender, else the exit code of the gate that stood in the way, with a ``hint``.
    """

    chosen: Contender | None
    rows: tuple[Row, ...]
    reason: str
    code: ExitCode = ExitCode.OK
    failures: tuple[str, ...] = field(default=())
    hint: str = ""


def check_gates(contender: Contender, gates: Gates) -> tuple[GateResult, ...]:
    """Apply every gate that the recipe sets to one contender."""
    results: list[GateResult] = []

    def check(name: str, kind: ExitCode, limit: float | None, got: float | None, at_least: bool = False) -> None:
        if limit is None:
            return
        if got is None:
            allowed = gates.unmeasured == "allow"
            results.append(GateResult(name, kind, limit, None, allowed, "unmeasured is allowed" if allowed else ""))
        else:
            # A NaN is neither: it holds no gate.
            results.append(GateResult(name, kind, limit, got, got >= limit if at_least else got <= limit))

    fidelity = (contender.verdict or {}).get("worst", {})
    check("cosine", ExitCode.GATE_FIDELITY, gates.cosine, fidelity.get("cosine"), at_least=True)
    check("max_abs_error", ExitCode.GATE_FIDELITY, gates.max_abs_error, fidelity.get("max_abs_error"))
    check("max_rel_error", ExitCode.GATE_FIDELITY, gates.max_rel_error, fidelity.get("max_rel_error"))
    check("agreement", ExitCode.GATE_FIDELITY, gates.agreement, fidelity.get("agreement"), at_least=True)
    accuracy = (contender.verdict or {}).get("accuracy") or {}
    check("accuracy_drop", ExitCode.GATE_ACCURACY, gates.accuracy_drop, accuracy.get("drop"))
    # For an error, where lower is better, the worst value allowed is the highest.
    higher = bool(accuracy.get("higher_is_better", True))
    check("min_accuracy", ExitCode.GATE_ACCURACY, gates.min_accuracy, accuracy.get("value"), at_least=higher)
    measured = contender.measurement or {}
    check("latency_ms", ExitCode.GATE_LATENCY, gates.latency_ms, measured.get("median_ms"))
    check("latency_p95_ms", ExitCode.GATE_LATENCY, gates.latency_p95_ms, measured.get("p95_ms"))
    check("memory_mb", ExitCode.GATE_MEMORY, gates.memory_mb, measured.get("peak_mb"))
    check("size_mb", ExitCode.GATE_SIZE, gates.size_mb, contender.size / 1e6)
    return tuple(results)


def select(
    contenders: Sequence[Contender],
    gates: Gates,
    precisions: Sequence[str],
    backends: Sequence[str],
    require: str | None = None,
) -> Selection:
    """Run the race of one target.

    Args:
        contenders: all engines, also those that could not be built.
        gates: the limits for this target.
        precisions: the profile's order of preference, used where nothing was measured.
        backends: likewise; it comes before that of the precisions.
        require: a precision that must be the one chosen.
    """
    states = [_judge(c, gates) for c in contenders]
    passed = [c for c, (_, state, _) in zip(contenders, states, strict=True) if state == "passed"]
    eligible = [c for c in passed if require is None or c.precision == require]
    chosen, reason = _choose(eligible, precisions, backends)
    if chosen is None:
        code, reason, failures = _failure(contenders, states, require)
    else:
        code, failures = ExitCode.OK, ()
        slower = _never_slower(chosen, passed, gates) if require else ""
        if slower:
            code, reason, failures, chosen = ExitCode.GATE_NEVER_SLOWER, slower, (slower,), None
    rows = tuple(
        _row(c, results, state, why, chosen, reason, require)
        for c, (results, state, why) in zip(contenders, states, strict=True)
    )
    wanted = [row for row in rows if require is None or row.contender.precision == require]
    return Selection(chosen, rows, reason, code, failures, _hint(code, wanted) if code else "")


def _judge(contender: Contender, gates: Gates) -> tuple[tuple[GateResult, ...], str, str]:
    if contender.refused:
        return (), "not offered", contender.refused
    if contender.verdict is None:
        return (), "not offered", f"not verified: {contender.unverified}"
    results = check_gates(contender, gates)
    broken = [r.describe() for r in results if not r.held]
    if problem := contender.verdict.get("problem"):
        return results, "rejected", str(problem)
    return results, "rejected" if broken else "passed", "; ".join(broken)


def _choose(
    eligible: Sequence[Contender], precisions: Sequence[str], backends: Sequence[str]
) -> tuple[Contender | None, str]:
    if not eligible:
        return None, ""
    measured = [c for c in eligible if c.median_ms is not None]
    if measured:
        best = min(measured, key=lambda c: (c.median_ms, _place(c.precision, precisions), _place(c.backend, backends)))
        many = f"the fastest of {len(measured)} measured engines that hold every gate"
        reason = "the only measured engine that holds every gate" if len(measured) == 1 else many
        others = ", ".join(c.id for c in eligible if c.unmeasured)
        return best, f"{reason}; not measured there, so not preferred: {others}" if others else reason
    best = min(eligible, key=lambda c: (_place(c.backend, backends), _place(c.precision, precisions)))
    return best, "not measured on this target: first in the profile's order of preference"


def _place(name: str, order: Sequence[str]) -> int:
    """The place of ``name`` in an order of preference; what the order leaves out comes last."""
    return order.index(name) if name in order else len(order)


def _never_slower(required: Contender, passed: Sequence[Contender], gates: Gates) -> str:
    """Why a required precision must not be taken: another one that passed is faster, or may be; else ``""``."""
    times = [(c.median_ms, c) for c in passed if c.precision != required.precision]
    measured = [(ms, c) for ms, c in times if ms is not None]
    if not measured:
        return ""
    ms, fastest = min(measured, key=lambda pair: pair[0])
    own = required.median_ms
    if own is None:
        if gates.unmeasured == "allow":
            return ""
        return (
            f"the required {required.precision} may be slower: {required.id} was not measured, "
            f"{fastest.id} takes {ms:.3f} ms"
        )
    if ms >= own:
        return ""
    return f"the required {required.precision} is slower: {required.id} takes {own:.3f} ms, {fastest.id} {ms:.3f} ms"


def _failure(
    contenders: Sequence[Contender],
    states: Sequence[tuple[tuple[GateResult, ...], str, str]],
    require: str | None,
) -> tuple[ExitCode, str, tuple[str, ...]]:
    """The exit code and words when nothing is left: those of the engine that came closest."""
    lines = tuple(f"{c.id}: {why or state}" for c, (_, state, why) in zip(contenders, states, strict=True))
    rejected = [
        [r for r in results if not r.held]
        for c, (results, state, _) in zip(contenders, states, strict=True)
        if state == "rejected" and (require is None or c.precision == require)
    ]
    named = f"no {require} engine" if require else "no engine"
    broken = [results for results in rejected if results]
    if broken:
        closest = min(broken, key=lambda results: (len(results), results[0].kind))
        return closest[0].kind, f"{named} holds every gate", lines
    if rejected:
        return ExitCode.GATE_FIDELITY, f"{named} computes valid outputs", lines
    reason = f"{named} could be built and verified"
    return ExitCode.COMPILE, reason, lines or (reason,)


def _hint(code: ExitCode, rows: Sequence[Row]) -> str:
    """What to do next; ``rows``: of the engines that might have been chosen."""
    unmeasured = 'set gates.unmeasured = "allow" in the recipe, or build on a machine that can measure this target'
    if code is ExitCode.GATE_NEVER_SLOWER:
        hint = "drop quantize.require from the recipe, or accept the faster precision"
        timed = any(row.state == "passed" and row.contender.median_ms is not None for row in rows)
        return hint if timed else f"{hint}; {unmeasured}"
    if code is ExitCode.COMPILE:
        return "read why no engine is offered; let the recipe or the target's profile allow another"
    missed = [[r.got for r in row.gates if not r.held] for row in rows if row.state == "rejected"]
    if any(got and all(value is None for value in got) for got in missed):
        return unmeasured
    relax = "relax the gate in the recipe, or improve the model; the table shows by how much it failed"
    return f"{relax}; for what was not measured {unmeasured}" if any(None in got for got in missed) else relax


def _row(
    contender: Contender,
    results: tuple[GateResult, ...],
    state: str,
    why: str,
    chosen: Contender | None,
    reason: str,
    require: str | None,
) -> Row:
    if contender is chosen:
        return Row(contender, results, "chosen", reason)
    if state != "passed":
        return Row(contender, results, state, why)
    if chosen is None:
        return Row(contender, results, state, "holds every gate" + (f", but is not {require}" if require else ""))
    if contender.median_ms is not None and chosen.median_ms:
        ratio = contender.median_ms / chosen.median_ms
        return Row(contender, results, state, f"{ratio:.2f} times the chosen engine's time")
    if contender.unmeasured and chosen.median_ms is not None:
        return Row(contender, results, state, f"holds every gate; {contender.unmeasured}: may be faster or slower")
    later = f"; {contender.unmeasured}" if contender.unmeasured else ""
    return Row(contender, results, state, f"holds every gate; later in the order of preference{later}")
