"""Metrics against scikit-learn and hand-made figures; NaN must never pass."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from toolchain.artifact import canonical_json
from toolchain.errors import ExitCode, ToolchainError
from toolchain.metrics import WORST, Fidelity, Metric, MetricSpec


def _batches(*arrays: np.ndarray, size: int = 7) -> Any:
    for start in range(0, len(arrays[0]), size):
        yield tuple(a[start : start + size] for a in arrays)


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((100, 5)).astype(np.float32)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, 100)


def _value(kind: str, outputs: np.ndarray, labels: np.ndarray, size: int = 7, **spec: Any) -> float:
    metric = Metric(MetricSpec(kind, **spec))
    for out, label in _batches(outputs, labels, size=size):
        metric.update({"y": out}, {"label": label})
    return metric.value()


def test_top1_f1_and_topk_equal_scikit_learn_whatever_the_batch_size(scores: np.ndarray, labels: np.ndarray) -> None:
    from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

    for size in (1, 7, 100):
        assert _value("top1", scores, labels, size) == pytest.approx(accuracy_score(labels, scores.argmax(1)))
        f1 = f1_score(labels, scores.argmax(1), average="macro")
        assert _value("f1", scores, labels, size) == pytest.approx(f1)
        assert _value("topk", scores, labels, size, k=2) == pytest.approx(top_k_accuracy_score(labels, scores, k=2))


def test_f1_counts_classes_that_are_never_predicted_and_those_never_labelled() -> None:
    from sklearn.metrics import f1_score

    outputs, labels = np.eye(6, dtype=np.float32)[[0, 0, 5, 1]], np.array([0, 3, 3, 1])
    expected = f1_score(labels, outputs.argmax(1), average="macro", zero_division=0)
    assert _value("f1", outputs, labels) == pytest.approx(expected)


def test_integer_outputs_are_taken_as_predicted_classes(labels: np.ndarray) -> None:
    guesses = np.where(np.arange(100) < 80, labels, (labels + 1) % 5)
    assert _value("top1", guesses, labels) == pytest.approx(0.8)


def test_token_level_labels_are_scored_per_token() -> None:
    outputs = np.zeros((2, 3, 4), np.float32)
    outputs[..., 1] = 1
    assert _value("top1", outputs, np.array([[1, 1, 0], [1, 2, 3]])) == pytest.approx(0.5)


def test_mae_and_cosine_use_labels_and_without_labels_the_original(scores: np.ndarray) -> None:
    assert _value("mae", scores, scores + 0.5) == pytest.approx(0.5)
    assert not MetricSpec("mae").higher_is_better
    metric = Metric(MetricSpec("cosine"))
    metric.update({"y": scores}, {}, {"y": 3 * scores})
    assert metric.value() == pytest.approx(1)
    assert _value("cosine", scores, -scores) == pytest.approx(-1)


def test_rows_with_nan_count_as_wrong_even_if_argmax_would_hit() -> None:
    outputs = np.array([[np.nan, 1], [0, 1]], np.float32)
    metric = Metric(MetricSpec("top1"))
    metric.update({"y": outputs}, {"label": np.array([0, 1])})
    assert metric.value() == 0.5
    assert "1 rows hold NaN" in metric.note


@pytest.mark.parametrize(("kind", "worst"), [("mae", WORST), ("cosine", -1.0)])
def test_nan_gives_the_worst_value_and_a_note(kind: str, worst: float) -> None:
    metric = Metric(MetricSpec(kind))
    metric.update({"y": np.full((2, 3), np.nan, np.float32)}, {}, {"y": np.ones((2, 3), np.float32)})
    assert metric.value() == worst
    assert "NaN" in metric.note
    assert json.loads(canonical_json(metric.value())) == worst


def test_an_own_function_is_called_once_with_all_batches_joined(scores: np.ndarray, labels: np.ndarray) -> None:
    calls = []

    def error_rate(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
        calls.append(1)
        return float((outputs["y"].argmax(1) != labels).mean())

    spec = MetricSpec("metric.py:error_rate", higher_is_better=False)
    metric = Metric(spec, error_rate)
    for out, label in _batches(scores, labels):
        metric.update({"y": out}, {"label": label})
    assert metric.value() == pytest.approx(1 - (scores.argmax(1) == labels).mean())
    assert len(calls) == 1
    assert not spec.higher_is_better


def test_an_own_function_gets_a_dict_of_several_label_sets_and_none_without_labels() -> None:
    seen: list[Any] = []
    spec = MetricSpec("m.py:f")
    for labels in ({"a": np.ones(2), "b": np.zeros(2)}, {}):
        metric = Metric(spec, lambda outputs, given: seen.append(given) or 1.0)
        metric.update({"y": np.ones((2, 2))}, labels)
        metric.value()
    assert sorted(seen[0]) == ["a", "b"]
    assert seen[1] is None


def test_an_own_function_that_returns_nan_gets_the_worst_value_and_one_that_returns_text_an_error() -> None:
    metric = Metric(MetricSpec("m.py:f"), lambda outputs, labels: float("nan"))
    metric.update({"y": np.ones((1, 2))})
    assert metric.value() == -WORST
    metric = Metric(MetricSpec("m.py:f"), lambda outputs, labels: "good")
    metric.update({"y": np.ones((1, 2))})
    with pytest.raises(ToolchainError, match="returned str; allowed: one number"):
        metric.value()


def test_mistakes_are_explained(scores: np.ndarray) -> None:
    with pytest.raises(ToolchainError, match="did you mean 'top1'") as caught:
        MetricSpec("top-1")
    assert caught.value.code == ExitCode.BAD_RECIPE
    with pytest.raises(ToolchainError, match="no labels") as caught:
        Metric(MetricSpec("top1")).update({"y": scores}, {})
    assert caught.value.code == ExitCode.USER_CODE
    with pytest.raises(ToolchainError, match=r"float64\[100, 5\]; allowed: integer class numbers"):
        _value("top1", scores, scores.astype(np.float64), size=100)
    with pytest.raises(ToolchainError, match=r"allowed: integer class numbers of shape \(1, 2, 4\)") as caught:
        Metric(MetricSpec("top1")).update({"mask": np.zeros((1, 2, 4, 3))}, {"label": np.zeros((1, 4, 3), int)})
    assert "along the last axis, here of 3; for another axis, as in segmentation" in caught.value.hint
    with pytest.raises(ToolchainError, match="did you mean 'logits'"):
        Metric(MetricSpec("top1", output="logit")).update({"logits": scores}, {"label": np.zeros(100, int)})
    with pytest.raises(ToolchainError, match="evaluation data is empty"):
        Metric(MetricSpec("top1")).value()


def _fidelity(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    fidelity = Fidelity()
    for got, wanted in pairs:
        fidelity.update({"y": np.asarray(got)}, {"y": np.asarray(wanted)})
    result = fidelity.result()
    canonical_json(result)  # no NaN, no infinity
    return result


def test_fidelity_over_batches_equals_hand_computed_figures() -> None:
    wanted = np.array([[1, 2, 4], [0, -8, 1]], np.float32)
    got = wanted + np.array([[0, 0.5, 0], [0, 0, 8]], np.float32)
    figures = _fidelity((got[:1], wanted[:1]), (got[1:], wanted[1:]))["outputs"]["y"]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(got, wanted, strict=True)]
    assert figures["max_abs_error"] == pytest.approx(8)
    assert figures["max_rel_error"] == pytest.approx(1.0)
    assert figures["cosine"] == pytest.approx(min(cosines))
    assert figures["cosine_mean"] == pytest.approx(sum(cosines) / 2)
    assert figures["agreement"] == 1.0


def test_elements_near_zero_do_not_blow_up_the_relative_error() -> None:
    figures = _fidelity(([[1e-3, 1.0]], [[1e-9, 1.0]]))["outputs"]["y"]
    assert figures["max_rel_error"] == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinity_of_the_engine_is_null_with_a_note_and_fails_every_limit(bad: float) -> None:
    result = _fidelity((np.ones((2, 3)), np.ones((2, 3))), ([[1, bad, 1]], np.ones((1, 3))))
    assert result["outputs"]["y"]["cosine"] is None
    assert result["worst"] == {"cosine": -1.0, "max_abs_error": WORST, "max_rel_error": WORST, "agreement": 0.0}
    assert "output 'y': NaN or infinity" in result["notes"][0]


def test_nan_in_both_at_the_same_place_is_equal_and_noted() -> None:
    array = np.array([[1, np.nan, 2.0]])
    result = _fidelity((array, array))
    assert result["worst"]["max_abs_error"] == 0
    assert result["worst"]["cosine"] == pytest.approx(1)
    assert "the original has NaN" in result["notes"][0]


def test_a_missing_output_or_another_shape_fails() -> None:
    fidelity = Fidelity()
    fidelity.update({"a": np.ones((2, 1))}, {"a": np.ones((2, 2)), "b": np.ones(2)})
    result = fidelity.result()
    assert result["worst"]["agreement"] == 0.0
    assert result["notes"] == ["output 'a': shape (2, 1) instead of (2, 2)", "output 'b': missing"]


def test_integers_and_bools_agree_by_equality_and_have_no_cosine() -> None:
    figures = _fidelity((np.array([1, 2, 3, 4]), np.array([1, 2, 3, 6])))["outputs"]["y"]
    assert figures["agreement"] == 0.75
    assert figures["cosine"] is None
    assert figures["max_abs_error"] == 2
    assert _fidelity((np.array([True]), np.array([True])))["worst"]["agreement"] == 1.0


def test_zero_rows_and_extreme_magnitudes_have_a_defined_cosine() -> None:
    assert _fidelity((np.zeros((1, 2)), np.zeros((1, 2))))["worst"]["cosine"] == 1.0
    assert _fidelity((np.ones((1, 2)), np.zeros((1, 2))))["worst"]["cosine"] == 0.0
    big = np.array([[3e38, 1e38]], np.float32)
    assert _fidelity((big, big))["worst"]["cosine"] == pytest.approx(1.0)
    assert _fidelity((np.array([[1e-200, 2e-200]]), np.array([[1e-200, 2e-200]])))["worst"]["cosine"] == pytest.approx(
        1
    )
