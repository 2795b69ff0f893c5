"""What a report says about its own evidence."""

from typing import Any

import pytest

from toolchain.recipe_parts import Gates
from toolchain.report import build_report, evidence_lines, to_markdown, weaknesses
from toolchain.select import Contender, select


def report(**verdict: Any) -> dict[str, Any]:
    """Of one target with one engine, verified as said; not verified if nothing is said."""
    worst = {"cosine": 1.0, "max_abs_error": 0.0, "max_rel_error": 0.0, "agreement": 1.0}
    whole = {"worst": worst, "problem": "", "evidence": "native", **verdict} if verdict else None
    contender = Contender("fp32", "onnxruntime", 1000, whole, None, "", "cannot run here")
    selection = select([contender], Gates(), ("fp32",), ("onnxruntime",), None)
    return build_report(
        name="n", version="1.0.0", target="t", selection=selection, stages={}, measurement=None,
        unmeasured="not asked for", tools={},
    )  # fmt: skip


def accuracy(original: float, **more: Any) -> dict[str, Any]:
    return {"metric": "top1", "value": original, "original": original, "drop": 0.0, "higher_is_better": True, **more}


def test_it_says_on_how_many_samples_of_what_the_outputs_were_verified() -> None:
    real = report(samples=540, random=False)
    assert evidence_lines(real) == ["verified on 540 samples of data.evaluation"]
    assert "- Verified on 540 samples of data.evaluation." in to_markdown(real)
    made = report(samples=16, random=True)
    assert evidence_lines(made) == ["verified on 16 random inputs: the recipe has no data.evaluation"]
    assert (made["verification"]["samples"], made["verification"]["random"]) == (16, True)
    assert evidence_lines(report()) == ["outputs not verified: no engine ran here"]


def test_few_samples_are_warned_of() -> None:
    assert report(samples=10, random=False)["verification"]["warnings"] == []
    (warning,) = report(samples=1, random=False)["verification"]["warnings"]
    assert "1 sample says little" in warning
    assert "- Warning: 1 sample says little" in to_markdown(report(samples=1, random=False))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (accuracy(0.0), "the original itself scores 0.0000: an accuracy gate says nothing"),
        (accuracy(0.105, chance=0.1), "scores 0.1050, and guessing scores 0.1000: an accuracy gate says nothing"),
    ],
)
def test_an_original_no_better_than_guessing_is_warned_of(scores: dict[str, Any], words: str) -> None:
    (warning,) = report(samples=100, random=False, accuracy=scores)["verification"]["warnings"]
    assert words in warning


def test_a_good_original_and_a_distance_of_zero_are_not_warned_of() -> None:
    for scores in (accuracy(0.9, chance=0.1), accuracy(0.0, higher_is_better=False)):
        assert report(samples=100, random=False, accuracy=scores)["verification"]["warnings"] == []


def test_what_a_bundle_does_not_show_is_listed() -> None:
    unmeasured = "not measured on the target: not asked for"
    assert weaknesses(report(samples=540, random=False)) == [unmeasured]
    assert weaknesses(report(samples=16, random=True, evidence="proxy")) == [
        "its outputs were verified on random inputs: the recipe has no data.evaluation",
        "its outputs were verified by proxy: on the build machine, not on the target",
        unmeasured,
    ]
    measured = report(samples=540, random=False)
    measured["engines"][0]["measurement"] = {"median_ms": 1.0}
    assert weaknesses(measured) == []
    assert weaknesses({"stages": {}}) == ["the report names no engine"]
