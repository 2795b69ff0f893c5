"""Accuracy and fidelity, fed batch by batch: sums and counts are kept, never the outputs themselves.

A value that is not a number never passes a comparison: rows with NaN count as wrong, and a figure that
cannot be computed because of them is :data:`WORST`, which no limit allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.fidelity import WORST, Fidelity, row_cosines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["KINDS", "WORST", "Fidelity", "Metric", "MetricSpec"]

Outputs = Mapping[str, "Array"]
Labels = Mapping[str, "Array"]
MetricFunction = Callable[[dict[str, "Array"], Any], Any]

KINDS = ("top1", "topk", "mae", "cosine", "f1")


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What is measured.

    Attributes:
        kind: one of :data:`KINDS`, or ``"file.py:function"``.
        k: for ``topk``.
        output: the output that is scored; None or "": the first one.
        higher_is_better: for an own function; the others know theirs.
    """

    kind: str
    k: int = 5
    output: str | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS and ".py:" not in self.kind:
            allowed = ", ".join(KINDS) + ", 'file.py:function'"
            what = f"got metric {self.kind!r}{did_you_mean(self.kind, KINDS)}; allowed: {allowed}"
            raise ToolchainError(what, where="metric.kind", code=ExitCode.BAD_RECIPE)
        if self.kind in KINDS:
            object.__setattr__(self, "higher_is_better", self.kind != "mae")
        if self.kind == "topk" and self.k < 1:
            raise ToolchainError(f"got k = {self.k}; allowed: 1 or more", where="metric.k", code=ExitCode.BAD_RECIPE)

    @property
    def worst(self) -> float:
        """The value of a result that is not a number."""
        if self.kind == "cosine":
            return -1.0
        return (0.0 if self.kind in KINDS else -WORST) if self.higher_is_better else WORST


class Metric:
    """Accumulates one metric.

    - ``top1``, ``topk``: share of rows (last axis: classes) whose label is among the k largest.
    - ``f1``: macro F1 over the classes that occur among labels or predictions (scikit-learn's definition).
    - ``mae``: mean absolute error over all elements, computed in float64.
    - ``cosine``: mean over the rows (first axis) of the cosine similarity of the flattened rows.
    - own function: called once, as ``function(outputs, labels)``, with all batches joined along the first
      axis (the one kind that keeps the outputs in memory); ``labels`` is an array when there is only one
      set named ``label``, else a dict, and None without labels.

    ``mae`` and ``cosine`` compare with the labels, or without labels with the original's outputs.

    Args:
        spec: what is measured.
        function: the resolved own function, when ``spec.kind`` names one.

    Raises:
        ToolchainError: USER_CODE for labels that are missing or don't fit; BAD_RECIPE for an unknown output.
    """

    def __init__(self, spec: MetricSpec, function: MetricFunction | None = None) -> None:
        if spec.kind not in KINDS and function is None:
            raise ValueError(f"metric {spec.kind!r} needs its function")
        self.spec = spec
        self.note = ""
        self._function = function
        self._sum, self._count = 0.0, 0
        self._width = 0  # of the scores: the number of classes
        self._classes: dict[int, list[int]] = {}  # class: [true positives, predicted, labelled]
        self._kept: list[tuple[dict[str, Array], dict[str, Array]]] = []

    def update(self, outputs: Outputs, labels: Labels | None = None, reference: Outputs | None = None) -> None:
        """Add a batch: the outputs to score, its labels, and the original's outputs on it."""
        if self._function is not None:
            self._kept.append((dict(outputs), dict(labels or {})))
            return
        name = _scored(outputs, self.spec.output)
        got, target = outputs[name], _target(name, labels or {}, reference, self.spec.kind)
        if self.spec.kind in ("mae", "cosine"):
            self._update_distance(got, target)
        else:
            self._update_classes(got, target)

    def value(self) -> float:
        """The metric so far: finite, and :attr:`MetricSpec.worst` (with :attr:`note` set) if it is not a number.

        Raises:
            ToolchainError: USER_CODE when there was no data, or the own function's result is no number.
        """
        if self._function is not None:
            return self._finite(self._call())
        if self.spec.kind == "f1" and self._classes:
            scores = [2 * tp / (predicted + labelled) for tp, predicted, labelled in self._classes.values()]
            return self._finite(sum(scores) / len(scores))
        if not self._count:
            raise _bad("there is nothing to score: the evaluation data is empty", self.spec.kind)
        return self._finite(self._sum / self._count)

    def chance(self) -> float | None:
        """The expected ``top1`` or ``topk`` of guessing, or None where it is not known."""
        if self.spec.kind not in ("top1", "topk") or not self._width:
            return None
        return min(1.0, (self.spec.k if self.spec.kind == "topk" else 1) / self._width)

    def _finite(self, value: float) -> float:
        if math.isfinite(value):
            return value
        self.note = self.note or "not a number: the outputs hold NaN or infinities"
        return self.spec.worst

    def _update_distance(self, got: Array, target: Array) -> None:
        import numpy as np

        target = np.asarray(target)
        if got.shape != target.shape:
            raise _bad(f"outputs have shape {got.shape}, labels {target.shape}; allowed: the same", self.spec.kind)
        if self.spec.kind == "mae":
            with np.errstate(invalid="ignore"):  # infinity minus itself is NaN, which value() reports
                difference = np.abs(got.astype(np.float64) - target.astype(np.float64))
            self._sum, self._count = self._sum + float(difference.sum()), self._count + difference.size
            return
        cosines = row_cosines(got, target)
        if np.isnan(cosines).any():
            self.note = f"{int(np.isnan(cosines).sum())} rows hold NaN and count as -1"
        self._sum += float(np.where(np.isnan(cosines), -1.0, cosines).sum())
        self._count += cosines.size

    def _update_classes(self, got: Array, target: Array) -> None:
        import numpy as np

        if got.dtype.kind == "f" and got.ndim >= 1:
            scores = got.reshape(-1, got.shape[-1])
            valid = ~np.isnan(scores).any(axis=-1)
            self._width = scores.shape[-1]
            k = min(self.spec.k if self.spec.kind == "topk" else 1, self._width)
            # A stable sort of the negated scores: the lower class wins a tie, as with argmax.
            best = np.argsort(-scores, axis=-1, kind="stable")[:, :k] if k > 1 else scores.argmax(-1)[:, None]
            expected = got.shape[:-1]
        else:
            best, valid, expected = got.reshape(-1, 1), np.ones(got.size, bool), got.shape
        wanted = np.asarray(target)
        if wanted.size != best.shape[0] or wanted.dtype.kind not in "iub":
            what = f"labels are {wanted.dtype}{list(wanted.shape)}; allowed: integer class numbers of shape {expected}"
            error = _bad(what, self.spec.kind)
            if got.ndim > 2:
                error.hint = (
                    f"scores of classes lie along the last axis, here of {got.shape[-1]}; for another axis, as in "
                    "segmentation, give a metric of your own: kind = 'file.py:function'"
                )
            raise error
        wanted = wanted.reshape(-1).astype(np.int64)
        if not valid.all():
            self.note = f"{int((~valid).sum())} rows hold NaN and count as wrong"
        hit = (best == wanted[:, None]).any(axis=-1) & valid
        self._sum, self._count = self._sum + float(hit.sum()), self._count + hit.size
        if self.spec.kind == "f1":
            self._count_classes(np.where(valid, best[:, 0], -1), wanted)

    def _count_classes(self, predicted: Array, wanted: Array) -> None:
        import numpy as np

        for column, classes in ((0, wanted[predicted == wanted]), (1, predicted[predicted >= 0]), (2, wanted)):
            for number, count in zip(*np.unique(classes, return_counts=True), strict=True):
                self._classes.setdefault(int(number), [0, 0, 0])[column] += int(count)

    def _call(self) -> float:
        import numpy as np

        if not self._kept:
            raise _bad("there is nothing to score: the evaluation data is empty", self.spec.kind)
        joined: list[dict[str, Array]] = []
        for part in (0, 1):
            names = self._kept[0][part]
            joined.append({n: np.concatenate([np.atleast_1d(kept[part][n]) for kept in self._kept]) for n in names})
        outputs, labels = joined
        given: Any = (labels["label"] if list(labels) == ["label"] else labels) if labels else None
        assert self._function is not None
        result = self._function(outputs, given)
        try:
            return float(result)
        except (TypeError, ValueError) as error:
            raise _bad(f"returned {type(result).__name__}; allowed: one number", self.spec.kind) from error


def _scored(outputs: Outputs, name: str | None) -> str:
    if not name:
        return next(iter(outputs))
    if name not in outputs:
        what = f"got output {name!r}{did_you_mean(name, outputs)}; the model's: {', '.join(outputs)}"
        raise ToolchainError(what, where="metric.output", code=ExitCode.BAD_RECIPE)
    return name


def _target(name: str, labels: Labels, reference: Outputs | None, kind: str) -> Array:
    for key in ("label", name, *(labels if len(labels) == 1 else ())):
        if key in labels:
            return labels[key]
    if labels:
        what = f"labels named {', '.join(labels)}; allowed: one array, or one named {name!r} like the scored output"
        raise _bad(what, kind)
    if kind in ("mae", "cosine") and reference is not None:
        return reference[name]
    raise _bad("the evaluation data has no labels", kind)


def _bad(what: str, kind: str) -> ToolchainError:
    return ToolchainError(
        what,
        where=f"metric {kind!r}",
        hint="the evaluation function must yield (inputs, labels)" if "labels" in what else "",
        code=ExitCode.USER_CODE,
    )
