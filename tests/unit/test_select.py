"""The race: the fastest engine that holds every gate, and never a slower one in silence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ExitCode
from toolchain.recipe_parts import Gates
from toolchain.select import Contender, Selection, check_gates, select

PRECISIONS = ("fp32", "int8-static", "int8-mixed", "int8-dynamic", "fp16")
BACKENDS = ("onnxruntime", "tvm")

FIGURE = st.floats(0, 10) | st.sampled_from([0.0, math.nan, math.inf]) | st.none()
LIMIT = st.none() | st.floats(0, 10)


def without_none(**figures: float | None) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


@st.composite
def verdicts(draw: st.DrawFn) -> dict[str, Any]:
    worst = without_none(**{n: draw(FIGURE) for n in ("cosine", "max_abs_error", "max_rel_error", "agreement")})
    verdict: dict[str, Any] = {"worst": worst, "problem": draw(st.sampled_from(["", "", "", "does not run"]))}
    if draw(st.booleans()):
        verdict["accuracy"] = {"value": draw(st.floats(0, 1)), "drop": draw(st.floats(-1, 1) | st.just(math.nan))}
    return verdict


def engine(precision: str = "fp32", backend: str = "onnxruntime", ms: float | None = 1.0, **figures: Any) -> Contender:
    """An engine with perfect figures but those given."""
    worst = {"cosine": 1.0, "max_abs_error": 0.0, "max_rel_error": 0.0, "agreement": 1.0}
    accuracy = {"value": 0.9, "original": 0.9, "drop": 0.0, "higher_is_better": True}
    row = None if ms is None else {"median_ms": ms, "p95_ms": ms, "peak_mb": 10.0}
    for name, value in figures.items():
        group = next(g for g in (worst, accuracy, row or {}) if name in g)
        group[name] = value
    return Contender(precision, backend, 1_000_000, {"worst": worst, "accuracy": accuracy, "problem": ""}, row)


@st.composite
def contenders(draw: st.DrawFn) -> list[Contender]:
    found = []
    for precision, backend in draw(st.sets(st.tuples(st.sampled_from(PRECISIONS), st.sampled_from(BACKENDS)))):
        if draw(st.booleans()):
            found.append(engine(precision, backend, draw(st.floats(0.01, 10))))
            continue
        refused = draw(st.sampled_from(["", "", "", "no operator"]))
        verdict = None if refused else draw(st.none() | verdicts())
        measured = {"median_ms": draw(FIGURE), "p95_ms": draw(FIGURE), "peak_mb": draw(FIGURE)}
        row = draw(st.none() | st.just(without_none(**measured)))
        found.append(Contender(precision, backend, draw(st.integers(0, 10**7)), verdict, row, refused, "cannot run"))
    return found


GATES = st.builds(
    Gates,
    cosine=st.none() | st.floats(0, 1),
    max_abs_error=LIMIT,
    max_rel_error=LIMIT,
    agreement=st.none() | st.floats(0, 1),
    accuracy_drop=LIMIT,
    min_accuracy=st.none() | st.floats(0, 1),
    latency_ms=LIMIT,
    latency_p95_ms=LIMIT,
    memory_mb=LIMIT,
    size_mb=LIMIT,
    unmeasured=st.sampled_from(["fail", "allow"]),
)
LOOSE = st.builds(Gates, latency_ms=LIMIT, size_mb=LIMIT, unmeasured=st.sampled_from(["fail", "allow"]))
ANY_GATES = LOOSE | GATES
REQUIRE = st.none() | st.sampled_from(PRECISIONS)


@st.composite
def winners(draw: st.DrawFn, gates: Gates, precision: str, unmeasured: bool) -> Contender:
    """An engine that holds every gate, its figures anywhere within the limits; ``unmeasured``: it has no times."""

    def within(limit: float | None, lowest: float = 0.0, highest: float = 20.0) -> float:
        return draw(st.floats(lowest, highest if limit is None else limit))

    worst = {
        "cosine": draw(st.floats(gates.cosine or 0.0, 1)),
        "max_abs_error": within(gates.max_abs_error),
        "max_rel_error": within(gates.max_rel_error),
        "agreement": draw(st.floats(gates.agreement or 0.0, 1)),
    }
    accuracy = {"value": draw(st.floats(gates.min_accuracy or 0.0, 1)), "drop": within(gates.accuracy_drop, -1.0)}
    limits = {"median_ms": gates.latency_ms, "p95_ms": gates.latency_p95_ms, "peak_mb": gates.memory_mb}
    row = None if unmeasured else {name: within(limit) for name, limit in limits.items()}
    size = int(within(gates.size_mb) * 1e6)
    verdict = {"worst": worst, "accuracy": accuracy, "problem": ""}
    return Contender(precision, draw(st.sampled_from(BACKENDS)), size, verdict, row)


def slower(contender: Contender, by: float | None) -> Contender:
    """The same with ``by`` milliseconds added to its median, or without times if ``by`` is None."""
    if by is None:
        return dataclasses.replace(contender, measurement=None)
    median = (contender.measurement or {}).get("median_ms")
    if median is None:
        return contender
    return dataclasses.replace(contender, measurement={**(contender.measurement or {}), "median_ms": median + by})


@st.composite
def won_races(draw: st.DrawFn) -> tuple[list[Contender], Gates, str | None]:
    """Engines, gates and a required precision (or none) where one engine can be chosen: one holds every gate, and
    where a precision is required none of another precision is faster.
    """
    gates, require = draw(ANY_GATES), draw(REQUIRE)
    untimed = gates.latency_ms is None and gates.latency_p95_ms is None and gates.memory_mb is None
    may_lack_times = gates.unmeasured == "allow" or (untimed and require is None)
    unmeasured = may_lack_times and draw(st.booleans())
    winner = draw(winners(gates, require or draw(st.sampled_from(PRECISIONS)), unmeasured))
    others = [c for c in draw(contenders()) if c.id != winner.id]
    if require is not None:
        # Its own precision must not win with a time that one of another precision beats.
        own = time_of(winner)
        others = [
            slower(c, own or 0.0) if c.precision != require else c if own is not None else slower(c, None)
            for c in others
        ]
    place = draw(st.integers(0, len(others)))
    return [*others[:place], winner, *others[place:]], gates, require


EXPECTED = {
    "cosine": ("cosine", ExitCode.GATE_FIDELITY),
    "max_abs_error": ("max_abs_error", ExitCode.GATE_FIDELITY),
    "max_rel_error": ("max_rel_error", ExitCode.GATE_FIDELITY),
    "agreement": ("agreement", ExitCode.GATE_FIDELITY),
    "accuracy_drop": ("drop", ExitCode.GATE_ACCURACY),
    "min_accuracy": ("value", ExitCode.GATE_ACCURACY),
    "latency_ms": ("median_ms", ExitCode.GATE_LATENCY),
    "latency_p95_ms": ("p95_ms", ExitCode.GATE_LATENCY),
    "memory_mb": ("peak_mb", ExitCode.GATE_MEMORY),
    "size_mb": ("size_mb", ExitCode.GATE_SIZE),
}


def figures(contender: Contender) -> dict[str, float]:
    """All figures of a contender under their names, written down again from the contract."""
    verdict = contender.verdict or {}
    return {
        **verdict.get("worst", {}),
        **verdict.get("accuracy", {}),
        **(contender.measurement or {}),
        "size_mb": contender.size / 1e6,
    }


def holds(contender: Contender, gates: Gates) -> bool:
    """Whether a contender holds every gate, decided without the code under test."""
    if contender.refused or contender.verdict is None or contender.verdict["problem"]:
        return False
    known = figures(contender)
    for gate, (figure, _) in EXPECTED.items():
        limit = getattr(gates, gate)
        if limit is None:
            continue
        got = known.get(figure)
        if got is None:
            if gates.unmeasured == "fail":
                return False
        elif math.isnan(got) or (got < limit if gate in ("cosine", "agreement", "min_accuracy") else got > limit):
            return False
    return True


def time_of(contender: Contender) -> float | None:
    value = (contender.measurement or {}).get("median_ms")
    return value if value is not None and math.isfinite(value) else None


def race(found: list[Contender], gates: Gates, require: str | None = None) -> Selection:
    return select(found, gates, PRECISIONS, BACKENDS, require)


# ---- what holds whatever the figures ----


@given(won_races())
def test_the_chosen_engine_holds_every_gate(won: tuple[list[Contender], Gates, str | None]) -> None:
    found, gates, require = won
    chosen = race(found, gates, require).chosen
    assert chosen is not None
    assert holds(chosen, gates)
    assert require in (None, chosen.precision)


@given(contenders(), ANY_GATES)
def test_something_is_chosen_exactly_when_something_holds_every_gate(found: list[Contender], gates: Gates) -> None:
    selection = race(found, gates)
    assert (selection.chosen is not None) == any(holds(c, gates) for c in found)
    assert (selection.code is ExitCode.OK) == (selection.chosen is not None)


@given(won_races())
def test_no_faster_measured_engine_that_holds_every_gate_is_passed_over(
    won: tuple[list[Contender], Gates, str | None],
) -> None:
    found, gates, require = won
    chosen = race(found, gates, require).chosen
    assert chosen is not None
    times = [t for c in found if holds(c, gates) and (t := time_of(c)) is not None]
    own = time_of(chosen)
    if own is not None:
        assert own == min(times)
    else:
        assert times == [] or (require is not None and gates.unmeasured == "allow")


@given(contenders(), ANY_GATES, REQUIRE)
def test_the_exit_code_is_of_the_kind_that_stood_in_the_way(
    found: list[Contender], gates: Gates, require: str | None
) -> None:
    selection = race(found, gates, require)
    wanted = [c for c in found if require in (None, c.precision)]
    broken = {r.kind for c in wanted if c.verdict for r in check_gates(c, gates) if not r.held}
    if selection.chosen is not None:
        assert selection.code is ExitCode.OK
    elif selection.code is ExitCode.GATE_NEVER_SLOWER:
        assert require is not None
        assert any(holds(c, gates) for c in wanted)
    elif selection.code is ExitCode.COMPILE:
        assert all(c.refused or c.verdict is None for c in wanted)
    elif broken:
        assert selection.code in broken
    else:
        assert selection.code is ExitCode.GATE_FIDELITY
    assert bool(selection.failures) == (selection.chosen is None)


@given(contenders(), ANY_GATES, REQUIRE)
def test_every_contender_has_its_row_with_a_reason(found: list[Contender], gates: Gates, require: str | None) -> None:
    selection = race(found, gates, require)
    assert [row.contender for row in selection.rows] == found
    assert all(row.reason for row in selection.rows)
    chosen = [row.contender for row in selection.rows if row.state == "chosen"]
    assert chosen == ([selection.chosen] if selection.chosen else [])
    for row in selection.rows:
        assert (row.state in ("chosen", "passed")) == holds(row.contender, gates)


@given(contenders(), ANY_GATES, REQUIRE, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_contenders(
    found: list[Contender], gates: Gates, require: str | None, random: Any
) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    first, second = race(found, gates, require), race(shuffled, gates, require)
    assert (first.chosen, first.code) == (second.chosen, second.code)


@given(contenders(), GATES)
def test_each_set_gate_gives_one_result_of_its_kind(found: list[Contender], gates: Gates) -> None:
    for contender in found:
        results = {r.gate: r for r in check_gates(contender, gates)}
        assert set(results) == {name for name in EXPECTED if getattr(gates, name) is not None}
        for name, result in results.items():
            figure, kind = EXPECTED[name]
            assert result.kind is kind
            assert result.got is None or result.got is figures(contender)[figure] or name == "size_mb"


# ---- single cases ----


ALL_LIMITS: dict[str, Any] = {
    "cosine": ("cosine", 0.99),
    "max_abs_error": ("max_abs_error", 0.1),
    "max_rel_error": ("max_rel_error", 0.1),
    "agreement": ("agreement", 0.99),
    "accuracy_drop": ("drop", 0.01),
    "min_accuracy": ("value", 0.8),
    "latency_ms": ("median_ms", 5.0),
    "latency_p95_ms": ("p95_ms", 5.0),
    "memory_mb": ("peak_mb", 50.0),
}


@pytest.mark.parametrize("gate", ALL_LIMITS)
def test_a_nan_holds_no_gate(gate: str) -> None:
    figure, limit = ALL_LIMITS[gate]
    for unmeasured in ("fail", "allow"):
        gates = Gates.model_validate({gate: limit, "unmeasured": unmeasured})
        assert check_gates(engine(), gates)[0].held
        (result,) = check_gates(engine(**{figure: math.nan}), gates)
        assert not result.held
        assert race([engine(**{figure: math.nan})], gates).code is EXPECTED[gate][1]


@pytest.mark.parametrize("gate", ALL_LIMITS)
def test_a_figure_at_the_limit_holds_and_one_past_it_does_not(gate: str) -> None:
    figure, limit = ALL_LIMITS[gate]
    gates = Gates.model_validate({gate: limit})
    past = -1e-9 if gate in ("cosine", "agreement", "min_accuracy") else 1e-9
    assert check_gates(engine(**{figure: limit}), gates)[0].held
    assert not check_gates(engine(**{figure: limit + past}), gates)[0].held


def test_the_worst_value_of_an_error_is_its_highest() -> None:
    gates = Gates(min_accuracy=0.5)
    assert check_gates(engine(value=0.4, higher_is_better=False), gates)[0].held
    assert not check_gates(engine(value=0.6, higher_is_better=False), gates)[0].held


def test_an_unmeasured_figure_fails_its_gate_unless_that_is_allowed() -> None:
    unmeasured = engine(ms=None)
    strict, lax = Gates(latency_ms=5.0), Gates(latency_ms=5.0, unmeasured="allow")
    selection = race([unmeasured], strict)
    assert (selection.chosen, selection.code) == (None, ExitCode.GATE_LATENCY)
    assert selection.failures == ("fp32/onnxruntime: latency_ms: got not measured, limit 5",)
    assert race([unmeasured], lax).chosen is unmeasured
    assert check_gates(unmeasured, lax)[0].note == "unmeasured is allowed"


def test_the_fastest_engine_is_chosen_and_the_others_are_compared_with_it() -> None:
    found = [engine(ms=2.0), engine("int8-static", ms=1.0), engine("fp16", ms=4.0, cosine=0.5)]
    selection = race(found, Gates(cosine=0.99))
    assert selection.chosen is found[1]
    assert [(row.state, row.reason) for row in selection.rows] == [
        ("passed", "2.00 times the chosen engine's time"),
        ("chosen", "the fastest of 2 measured engines that hold every gate"),
        ("rejected", "cosine: got 0.5, limit 0.99"),
    ]


def test_an_engine_with_no_usable_time_never_wins_a_race_against_a_measured_one() -> None:
    for useless in (math.nan, math.inf):
        found = [engine("int8-static", ms=useless), engine(ms=3.0)]
        assert race(found, Gates()).chosen is found[1]


def test_a_required_precision_that_is_slower_fails_the_build_by_name() -> None:
    found = [engine(ms=1.0), engine("int8-static", ms=1.5)]
    selection = race(found, Gates(), require="int8-static")
    assert (selection.chosen, selection.code) == (None, ExitCode.GATE_NEVER_SLOWER)
    assert selection.reason == (
        "the required int8-static is slower: int8-static/onnxruntime takes 1.500 ms, fp32/onnxruntime 1.000 ms"
    )


def test_a_required_precision_that_is_fastest_is_chosen() -> None:
    found = [engine(ms=1.0), engine("int8-static", ms=0.5), engine("int8-static", "tvm", ms=0.7)]
    assert race(found, Gates(), require="int8-static").chosen is found[1]


def test_a_required_precision_is_not_compared_with_engines_that_break_a_gate() -> None:
    found = [engine(ms=0.1, cosine=0.5), engine("int8-static", ms=1.5)]
    assert race(found, Gates(cosine=0.9), require="int8-static").chosen is found[1]


def test_a_required_precision_that_was_not_measured_beside_others_that_were_is_not_taken_in_silence() -> None:
    found = [engine(ms=1.0), engine("int8-static", ms=None)]
    selection = race(found, Gates(), require="int8-static")
    assert (selection.chosen, selection.code) == (None, ExitCode.GATE_NEVER_SLOWER)
    assert "int8-static/onnxruntime was not measured, fp32/onnxruntime takes 1.000 ms" in selection.reason


def test_without_measurements_the_profiles_order_decides_backend_first() -> None:
    found = [engine("int8-static", "tvm", ms=None), engine("fp32", "tvm", ms=None), engine("fp16", ms=None)]
    selection = race(found, Gates())
    assert selection.chosen is found[2]
    assert "order of preference" in selection.reason


def test_a_required_precision_that_was_not_measured_is_taken_where_unmeasured_figures_are_allowed() -> None:
    found = [engine(ms=1.0), engine("int8-static", ms=None)]
    assert race(found, Gates(unmeasured="allow"), require="int8-static").chosen is found[1]


def test_a_required_precision_is_taken_where_nothing_is_measured() -> None:
    found = [engine(ms=None), engine("int8-static", ms=None)]
    assert race(found, Gates(), require="int8-static").chosen is found[1]


def test_what_the_order_of_preference_leaves_out_comes_last() -> None:
    found = [engine("int4", "other", ms=None), engine("fp16", "tvm", ms=None)]
    assert race(found, Gates()).chosen is found[1]
    assert race(found[:1], Gates()).chosen is found[0]


def test_an_engine_that_does_not_compute_is_rejected_whatever_the_gates() -> None:
    broken = Contender("fp32", "tvm", 1, {"worst": {}, "problem": "outputs hold NaN"}, {"median_ms": 0.1})
    selection = race([broken], Gates())
    assert (selection.chosen, selection.code) == (None, ExitCode.GATE_FIDELITY)
    assert selection.rows[0].reason == "outputs hold NaN"


def test_engines_that_were_never_built_end_with_a_compile_failure() -> None:
    refused = Contender("fp32", "tvm", refused="no operator for LSTM")
    selection = race([refused], Gates())
    assert (selection.chosen, selection.code) == (None, ExitCode.COMPILE)
    assert selection.failures == ("fp32/tvm: no operator for LSTM",)


# ---- what a failure says ----


@pytest.mark.parametrize(
    ("cosine", "limit", "shown"),
    [
        (0.99999994, 0.9999999999, "cosine: got 0.99999994, limit 0.9999999999"),
        (0.5, 0.9999999999, "cosine: got 0.5, limit 0.9999999999"),
        (0.98999999999, 0.99, "cosine: got 0.98999999999, limit 0.99"),
        (0.123456789, 0.99, "cosine: got 0.123457, limit 0.99"),
        (math.nextafter(0.9, 0), 0.9, "cosine: got 0.8999999999999999, limit 0.9"),
        (math.nan, 0.99, "cosine: got nan, limit 0.99"),
    ],
)
def test_a_missed_gate_shows_figures_that_differ(cosine: float, limit: float, shown: str) -> None:
    (result,) = check_gates(engine(cosine=cosine), Gates(cosine=limit))
    assert result.describe() == shown


ALLOW = 'gates.unmeasured = "allow"'


def test_a_figure_that_was_not_measured_is_no_reason_to_relax_its_gate() -> None:
    hint = race([engine(ms=None), engine("int8-static", ms=None, cosine=0.1)], Gates(latency_ms=5.0, cosine=0.9)).hint
    assert ALLOW in hint
    assert "a machine that can measure" in hint
    assert "relax" not in hint


def test_a_missed_gate_is_to_be_relaxed_and_what_was_not_measured_beside_it_is_named() -> None:
    assert race([engine(ms=9.0)], Gates(latency_ms=5.0)).hint.startswith("relax the gate")
    assert ALLOW not in race([engine(ms=9.0)], Gates(latency_ms=5.0)).hint
    both = race([engine(ms=None, cosine=0.1)], Gates(latency_ms=5.0, cosine=0.9)).hint
    assert "relax the gate" in both
    assert ALLOW in both


def test_only_engines_of_the_required_precision_count_for_the_hint() -> None:
    found = [engine(ms=None), engine("int8-static", ms=1.0, cosine=0.1)]
    hint = race(found, Gates(latency_ms=5.0, cosine=0.9), require="int8-static").hint
    assert "relax the gate" in hint
    assert ALLOW not in hint


def test_a_slower_required_precision_is_to_be_dropped() -> None:
    hint = race([engine(ms=1.0), engine("int8-static", ms=1.5)], Gates(), require="int8-static").hint
    assert hint == "drop quantize.require from the recipe, or accept the faster precision"
    assert ALLOW in race([engine(ms=1.0), engine("int8-static", ms=None)], Gates(), require="int8-static").hint


def test_a_race_that_is_won_needs_no_hint() -> None:
    assert race([engine()], Gates()).hint == ""
