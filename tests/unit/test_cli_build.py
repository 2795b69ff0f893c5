"""`toolchain build`: the error of a build whose gates failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toolchain.cli.build import _no_release
from toolchain.errors import ExitCode
from toolchain.recipe_parts import Gates
from toolchain.select import Contender, select


def outcome(target: str, contenders: list[Contender], gates: Gates, require: str | None = None) -> Any:
    """A target's result as far as the error looks at it."""
    return SimpleNamespace(target=target, selection=select(contenders, gates, (), (), require))


def engine(precision: str, ms: float | None) -> Contender:
    verdict = {"worst": {"cosine": 1.0}, "problem": ""}
    return Contender(precision, "onnxruntime", 1, verdict, None if ms is None else {"median_ms": ms})


def test_a_reason_is_told_once_and_the_hint_fits_it() -> None:
    failed = [outcome("here", [engine("fp32", 1.0), engine("int8-static", 2.0)], Gates(), "int8-static")]
    text = _no_release(Path("r.toml"), ExitCode.GATE_NEVER_SLOWER, failed).render()
    assert text.count("the required int8-static is slower") == 1
    assert "hint: drop quantize.require" in text
    assert "relax" not in text


def test_targets_with_the_same_failure_share_one_hint() -> None:
    failed = [outcome(name, [engine("fp32", None)], Gates(latency_ms=1.0)) for name in ("one", "two")]
    error = _no_release(Path("r.toml"), ExitCode.GATE_LATENCY, failed)
    assert error.hint.count("gates.unmeasured") == 1
    assert len(error.details) == len(set(error.details)) == 2
