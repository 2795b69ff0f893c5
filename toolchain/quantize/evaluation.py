"""A candidate's accuracy and fidelity on the evaluation data, against the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data import read_batches, read_outputs
from toolchain.figures import apart
from toolchain.metrics import Fidelity, Metric, MetricFunction, MetricSpec
from toolchain.quantize.model import run_session, session_of
from toolchain.quantize.scheme import AccuracyLimits

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one candidate.

    Attributes:
        value, original: the metric of the candidate and of the original; None without a metric.
        drop: how much worse the candidate is, in the metric's unit; negative when it is better.
        worst: fidelity over all outputs (see :class:`toolchain.fidelity.Fidelity`).
        misses: limits that don't hold, one line each with figures; empty: all hold.
    """

    value: float | None
    original: float | None
    drop: float | None
    worst: dict[str, Any]
    misses: tuple[str, ...]

    @property
    def summary(self) -> str:
        """E.g. ``"top1 0.519 vs 0.9287"``, or the lowest cosine without a metric."""
        if self.value is None or self.original is None:
            return ", ".join(f"{key} {value:.6g}" for key, value in self.worst.items() if value is not None)
        return f"{self.value:.6g} vs {self.original:.6g}"

    def facts(self) -> dict[str, Any]:
        figures = {"value": self.value, "original": self.original, "drop": self.drop}
        return {**figures, "worst": self.worst, "misses": list(self.misses)}


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates candidates in ONNX Runtime on the CPU, one batch in memory at a time.

    Attributes:
        evaluation, reference: folders of the ``dataset`` and of the original's outputs on it.
        metric, function: see :class:`toolchain.metrics.Metric`; None: fidelity only.
        limits: what must hold.
    """

    evaluation: Path
    reference: Path
    metric: MetricSpec | None
    function: MetricFunction | None
    limits: AccuracyLimits

    def __call__(self, model: onnx.ModelProto) -> Evaluation:
        """Run ``model`` over the evaluation data.

        Raises:
            ToolchainError: USER_CODE when the labels don't fit the metric.
        """
        spec = self.metric
        ours, theirs = (Metric(spec, self.function), Metric(spec, self.function)) if spec else (None, None)
        fidelity = Fidelity()
        with session_of(model) as session:
            for batch, original in zip(read_batches(self.evaluation), read_outputs(self.reference), strict=True):
                outputs = run_session(session, batch.inputs)
                fidelity.update(outputs, original)
                if ours and theirs:
                    ours.update(outputs, batch.labels, original)
                    theirs.update(original, batch.labels, original)
        worst = fidelity.result()["worst"]
        value, original_value, drop = None, None, None
        if spec and ours and theirs:
            value, original_value = ours.value(), theirs.value()
            drop = original_value - value if spec.higher_is_better else value - original_value
        higher = spec.higher_is_better if spec else True
        return Evaluation(value, original_value, drop, worst, _misses(self.limits, value, drop, worst, higher))


def evaluation_of(verdict: Mapping[str, Any], limits: AccuracyLimits, higher_is_better: bool) -> Evaluation | None:
    """What a verify stage found on the same data under the same metric; None when the engine did not run."""
    if verdict["problem"]:
        return None
    accuracy = verdict.get("accuracy", {})
    worst = {key: verdict["worst"][key] for key in ("cosine", "max_abs_error", "max_rel_error", "agreement")}
    value, original, drop = (accuracy.get(key) for key in ("value", "original", "drop"))
    return Evaluation(value, original, drop, worst, _misses(limits, value, drop, worst, higher_is_better))


def _misses(
    limits: AccuracyLimits, value: float | None, drop: float | None, worst: dict[str, Any], higher: bool
) -> tuple[str, ...]:
    checks = (
        ("cosine", worst["cosine"], limits.cosine, True),
        ("max_abs_error", worst["max_abs_error"], limits.max_abs_error, False),
        ("max_rel_error", worst["max_rel_error"], limits.max_rel_error, False),
        ("agreement", worst["agreement"], limits.agreement, True),
        ("accuracy_drop", drop, limits.accuracy_drop, False),
        ("min_accuracy", value, limits.min_accuracy, higher),
    )
    lines = []
    for name, got, limit, at_least in checks:
        if limit is None or got is None:
            continue
        if not (got >= limit if at_least else got <= limit):
            shown, allowed = apart(got, limit)
            lines.append(f"{name}: {shown}, allowed {'at least' if at_least else 'at most'} {allowed}")
    return tuple(lines)
