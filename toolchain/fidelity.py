"""Fidelity: how close outputs are to the original's, fed batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Outputs = Mapping[str, "Array"]

WORST = 1.7976931348623157e308
"""Stands for an infinitely large error; the largest float64, because JSON has no infinity."""

_TINY = 1.1920929e-07  # float32's epsilon


@dataclass(slots=True)
class _OutputFidelity:
    """Running figures of one output."""

    max_abs: float = 0.0
    reference_max: float = 0.0
    cosine_min: float | None = None
    cosine_sum: float = 0.0
    rows: int = 0
    agreeing: int = 0
    compared: int = 0
    broken: int = 0
    notes: dict[str, None] = field(default_factory=dict)


class Fidelity:
    """How close an engine's outputs are to the original's, per output and over all batches.

    - ``max_abs_error``: largest absolute difference of an element.
    - ``max_rel_error``: ``max_abs_error`` divided by the largest absolute value of the original's output over
      all data (at least float32's epsilon), so that elements near zero don't blow it up.
    - ``cosine``, ``cosine_mean``: lowest and mean cosine similarity of the flattened rows (first axis);
      float outputs only.
    - ``agreement``: share of rows with the same argmax (2-D float outputs with two columns or more), share of
      equal elements (integers, bool), else null.

    NaN at the same place in both is equal.  NaN or infinity where the original has a number (or the reverse)
    makes every figure of that output null, with a note, and every figure of ``worst`` fail any limit.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, _OutputFidelity] = {}

    def update(self, outputs: Outputs, reference: Outputs) -> None:
        """Add a batch: the engine's outputs and the original's, by name."""
        for name, wanted in reference.items():
            state = self._outputs.setdefault(name, _OutputFidelity())
            got = outputs.get(name)
            if got is None or got.shape != wanted.shape:
                state.broken += 1
                state.notes["missing" if got is None else f"shape {got.shape} instead of {wanted.shape}"] = None
            elif wanted.size:
                _compare(state, got, wanted)

    def result(self) -> dict[str, Any]:
        """``{"outputs": {name: figures}, "worst": figures over all outputs, "notes": [...]}``; JSON, no NaN."""
        outputs = {name: _figures(state) for name, state in self._outputs.items()}
        notes = [f"output {name!r}: {note}" for name, state in self._outputs.items() for note in state.notes]
        worst: dict[str, Any] = {"cosine": None, "max_abs_error": None, "max_rel_error": None, "agreement": None}
        if any(state.broken for state in self._outputs.values()):
            worst = {"cosine": -1.0, "max_abs_error": WORST, "max_rel_error": WORST, "agreement": 0.0}
        else:
            for key in worst:
                values = [figures[key] for figures in outputs.values() if figures[key] is not None]
                if values:
                    worst[key] = max(values) if key.startswith("max") else min(values)
        return {"outputs": outputs, "worst": worst, "notes": notes}


def row_cosines(a: Array, b: Array) -> Array:
    """Cosine similarity in float64 of each flattened row (first axis) of two arrays of one shape.

    Arrays of fewer than two axes are one row.  Two zero rows: 1; one zero row: 0.  NaN where a row has NaN or
    an infinity.
    """
    import numpy as np

    rows = a.shape[0] if a.ndim > 1 else 1
    x, y = (v.reshape(rows, -1).astype(np.float64) for v in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        # Scaling first keeps the squares of very large and very small rows in range.
        x, y = (v / np.maximum(np.abs(v).max(axis=1, keepdims=True, initial=0.0), 1e-300) for v in (x, y))
        lengths = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        cosines: Array = np.where(lengths > 0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1.0), 0.0)
    cosines = np.where((x == 0).all(axis=1) & (y == 0).all(axis=1), 1.0, cosines)
    broken = ~(np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1))
    return np.where(broken, np.nan, np.clip(cosines, -1.0, 1.0))


def _compare(state: _OutputFidelity, got: Array, wanted: Array) -> None:
    import numpy as np

    if wanted.dtype.kind != "f":
        state.agreeing += int((got == wanted).sum())
        state.compared += wanted.size
        a, b = got.astype(np.float64), wanted.astype(np.float64)
    else:
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        finite = np.isfinite(got) & np.isfinite(wanted)
        if bad := int((~(same | finite)).sum()):
            state.broken += bad
            state.notes["NaN or infinity where the original has another value, or the reverse"] = None
            return
        if not finite.all():
            state.notes["the original has NaN or infinities too, at the same places"] = None
        a, b = (np.where(finite, v, 0).astype(np.float64) for v in (got, wanted))
        cosines = row_cosines(a, b)
        low = float(cosines.min())
        state.cosine_min = low if state.cosine_min is None else min(state.cosine_min, low)
        state.cosine_sum, state.rows = state.cosine_sum + float(cosines.sum()), state.rows + cosines.size
        if wanted.ndim == 2 and wanted.shape[1] > 1:
            state.agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            state.compared += wanted.shape[0]
    state.max_abs = max(state.max_abs, float(np.abs(a - b).max()))
    state.reference_max = max(state.reference_max, float(np.abs(b).max()))


def _figures(state: _OutputFidelity) -> dict[str, Any]:
    ok = not state.broken
    return {
        "max_abs_error": state.max_abs if ok else None,
        "max_rel_error": state.max_abs / max(state.reference_max, _TINY) if ok else None,
        "cosine": state.cosine_min if ok else None,
        "cosine_mean": state.cosine_sum / state.rows if ok and state.rows else None,
        "agreement": state.agreeing / state.compared if ok and state.compared else None,
        "broken": state.broken,
    }
