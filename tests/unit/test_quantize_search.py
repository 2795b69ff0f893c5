"""The search for layers to keep float, on made-up evaluations: minimal, bounded, and judged by the evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.quantize.evaluation import Evaluation
from toolchain.quantize.sensitivity import MAX_RETURNS, Layer, RankedLayer, SearchResult, search


def _ranked(count: int, weighted: Collection[int] | None = None) -> list[RankedLayer]:
    names = [f"n{i}" for i in range(count)]
    flags = [weighted is None or i in weighted for i in range(count)]
    return [RankedLayer(Layer(n, (n,), 1, w), 1.0 / (i + 1)) for i, (n, w) in enumerate(zip(names, flags, strict=True))]


def _search(count: int, needed: set[str], limit: int | None = None) -> SearchResult:
    def evaluate(kept: Collection[str]) -> Evaluation:
        misses = () if needed <= set(kept) else ("accuracy_drop: 0.4, allowed at most 0.01",)
        return Evaluation(0.5, 0.9, 0.4, {}, misses)

    return search(_ranked(count), evaluate, limit)


def _kept(result: SearchResult) -> set[str]:
    assert result.kept is not None
    return {entry.layer.name for entry in result.kept}


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 40), data=st.data())
def test_a_needed_prefix_of_the_ranking_is_found_exactly_in_few_evaluations(count: int, data: st.DataObject) -> None:
    needed = {f"n{i}" for i in range(data.draw(st.integers(1, count - 1)))}
    result = _search(count, needed)
    assert _kept(result) == needed
    assert len(result.tries) <= 2 * math.ceil(math.log2(count + 1)) + MAX_RETURNS
    assert len({attempt.kept for attempt in result.tries}) == len(result.tries)  # nothing is evaluated twice


def test_layers_that_turn_out_not_to_matter_are_given_back() -> None:
    assert _kept(_search(20, {"n0", "n5"})) == {"n0", "n5"}
    assert _kept(_search(20, {"n5"})) == {"n5"}


def test_the_result_was_evaluated_and_held() -> None:
    result = _search(20, {"n2", "n9"})
    holding = [set(t.kept) for t in result.tries if not t.evaluation.misses]
    assert _kept(result) in holding


def test_one_layer_with_weights_always_stays_quantized() -> None:
    result = _search(6, {f"n{i}" for i in range(6)})
    assert result.kept is None
    assert max(len(t.kept) for t in result.tries) == 5


def test_layers_without_weights_do_not_count_as_what_stays_quantized() -> None:
    def fails(kept: Collection[str]) -> Evaluation:
        return Evaluation(None, None, None, {}, ("cosine",))

    result = search(_ranked(6, weighted={0, 1, 2}), fails)
    assert result.kept is None
    assert max(len(t.kept) for t in result.tries) == 2


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_no_try_keeps_more_layers_than_allowed(limit: int) -> None:
    result = _search(16, {"n4"}, limit)
    assert result.kept is None
    assert all(t.layers <= limit for t in result.tries)
