"""Two results of one model on the same inputs: how far apart, and whether that is rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

RELATIVE_TOLERANCE = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-3}
"""Allowed error of an output relative to its largest absolute value, by dtype."""

ABSOLUTE_FLOOR = 1e-6
"""Errors below this are rounding, whatever the output's scale."""

MISMATCH_SHARE = 0.01
"""Allowed share of differing elements of an integer or boolean output (near ties of an argmax)."""

WITHOUT_SPINNING = ("session.intra_op.allow_spinning", "0")
"""ONNX Runtime's entry for sessions that are not timed: threads sleep instead of spinning; same values, less CPU."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Worst difference over outputs and runs.

    Attributes:
        max_abs: largest absolute error of a float output.
        max_rel: largest absolute error relative to that output's largest absolute value.
        mismatch: largest share of differing elements of an integer or boolean output.
        problem: why the results count as different, naming the output, or "".
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    mismatch: float = 0.0
    problem: str = ""

    def worst(self, other: Difference) -> Difference:
        """The larger figures of both; the first problem."""
        return Difference(
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            max(self.mismatch, other.mismatch),
            self.problem or other.problem,
        )

    def facts(self) -> dict[str, float]:
        """Figures to three significant digits."""
        rounded = {"max_abs_error": self.max_abs, "max_rel_error": self.max_rel, "mismatch": self.mismatch}
        return {name: float(f"{value:.3g}") for name, value in rounded.items()}


def compare(reference: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]]) -> Difference:
    """The difference of ``got`` from ``reference``, output by output; names, dtypes and shapes must agree."""
    if list(reference) != list(got):
        return Difference(problem=f"outputs are {list(got)} instead of {list(reference)}")
    worst = Difference()
    for name, expected in reference.items():
        worst = worst.worst(_compare_one(name, expected, got[name]))
    return worst


def _compare_one(name: str, expected: NDArray[Any], got: NDArray[Any]) -> Difference:
    import numpy as np

    if got.shape != expected.shape or got.dtype != expected.dtype:
        shapes = f"{got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
        return Difference(problem=f"output {name!r} is {shapes}")
    if not expected.size:
        return Difference()
    if expected.dtype.kind != "f":
        share = float((expected != got).mean())
        problem = f"{share:.1%} of output {name!r} differs" if share > MISMATCH_SHARE else ""
        return Difference(mismatch=share, problem=problem)
    if not np.isfinite(got).all():
        return Difference(problem=f"output {name!r} holds NaN or infinity")
    error = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max())
    scale = float(np.abs(expected).max())
    relative = error / scale if scale else (0.0 if error <= ABSOLUTE_FLOOR else float("inf"))
    allowed = ABSOLUTE_FLOOR + RELATIVE_TOLERANCE[str(expected.dtype)] * scale
    problem = f"output {name!r} differs by {error:.3g} (largest value {scale:.3g}, allowed {allowed:.3g})"
    return Difference(error, relative, problem=problem if error > allowed else "")


def session(model: Path | bytes) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, of a file or its bytes, all graph optimizations off, silent."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry(*WITHOUT_SPINNING)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(opened: Any, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs by name."""
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, dict(inputs)), strict=True))
