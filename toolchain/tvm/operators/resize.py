"""Resize and Upsample in every mode, an axis at a time, from tables of source positions and weights.

Formulas: the ONNX specification of Resize.  The tables are computed here once, so the loop nest does no arithmetic on
coordinates: out[.., o, ..] = sum over taps k of weight[o, k] * x[.., position[o, k], ..].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.operators.elementwise import is_float
from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class _Axis:
    """How one axis changes: sizes, their ratio as ONNX has it, and its part of the region of interest."""

    axis: int
    size: int
    out: int
    scale: float
    region: tuple[float, float]


def _resize(node: OpNode) -> Any:
    if node.opset < 11:
        return _upsample(node)
    scales, sizes = _floats(node, 2, "scales"), _floats(node, 3, "sizes")
    try:
        shape = node.shape(0)
    except Unsupported:
        return _dynamic(node, scales)
    axes = [int(a) % len(shape) for a in node.attrs.get("axes", range(len(shape)))]
    changes = _changes(node, shape, axes, scales, sizes)
    if _tvm_is_right(node, changes):
        return node.default()
    return _apply(node, changes)


def _upsample(node: OpNode) -> Any:
    """Upsample 7 has its scales as an attribute, 9 as an input; as Resize 10: asymmetric, rounded down."""
    scales = node.attrs.get("scales")
    scales = [float(s) for s in scales] if scales is not None else _floats(node, 1, "scales")
    if scales is None:
        raise Unsupported("no scales")
    shape = node.shape(0)
    changes = [
        _Axis(i, n, math.floor(n * s), s, (0.0, 1.0)) for i, (n, s) in enumerate(zip(shape, scales, strict=True))
    ]
    return _apply(node, changes, coordinates="asymmetric", nearest="floor")


def _floats(node: OpNode, index: int, what: str) -> list[float] | None:
    if not node.has(index):
        return None
    values = [float(v) for v in node.constant(index, what).reshape(-1)]
    return values or None


def _dynamic(node: OpNode, scales: list[float] | None) -> Any:
    """With unknown sizes TVM derives the scale from the rounded sizes: right for whole factors alone."""
    plain = node.text("keep_aspect_ratio_policy", "stretch") == "stretch" and not node.integer("antialias", 0)
    if scales is None or "axes" in node.attrs or not plain:
        raise Unsupported("this form needs static sizes")
    if scales[:2] != [1.0, 1.0] or not all(s.is_integer() for s in scales):
        raise Unsupported("with dynamic sizes only whole factors of spatial axes are supported")
    return node.default()


def _changes(
    node: OpNode, shape: Sequence[int], axes: list[int], scales: list[float] | None, sizes: list[float] | None
) -> list[_Axis]:
    region = _floats(node, 1, "roi") if node.has(1) else None
    count = len(axes)
    ends = [(0.0, 1.0)] * count if region is None else [(region[i], region[i + count]) for i in range(count)]
    if sizes is not None:
        ratios = [s / shape[a] for a, s in zip(axes, sizes, strict=True)]
        policy = node.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratios = [min(ratios) if policy == "not_larger" else max(ratios)] * count
            sizes = [math.floor(r * shape[a] + 0.5) for a, r in zip(axes, ratios, strict=True)]
        out = [int(s) for s in sizes]
    elif scales is not None:
        ratios = scales
        out = [math.floor(shape[a] * s) for a, s in zip(axes, ratios, strict=True)]
    else:
        raise Unsupported("neither scales nor sizes")
    return [_Axis(a, shape[a], o, r, e) for a, o, r, e in zip(axes, out, ratios, ends, strict=True)]


def _tvm_is_right(node: OpNode, changes: list[_Axis]) -> bool:
    """The common cases, left to TVM's own image operator, whose layout the pipeline may change."""
    spatial = [c for c in changes if c.axis >= 2]
    outer = [c for c in changes if c.axis < 2]
    return (
        node.rank(0) == 4
        and node.dtype(0) == "float32"
        and "axes" not in node.attrs
        and node.text("mode", "nearest") in ("nearest", "linear")
        and node.text("coordinate_transformation_mode", "half_pixel") in ("half_pixel", "asymmetric", "align_corners")
        and node.text("nearest_mode", "round_prefer_floor") in ("round_prefer_floor", "floor")
        and not node.integer("antialias", 0)
        and not node.integer("exclude_outside", 0)
        and all(c.size == c.out and c.scale == 1.0 for c in outer)
        and all(c.size * c.scale == c.out for c in spatial)
    )


def _apply(node: OpNode, changes: list[_Axis], coordinates: str = "", nearest: str = "") -> Any:
    from tvm import relax

    op, dtype = relax.op, node.dtype(0)
    coordinates = coordinates or node.text("coordinate_transformation_mode", "half_pixel")
    nearest = nearest or node.text("nearest_mode", "round_prefer_floor")
    mode = node.text("mode", "nearest")
    value = node.input(0)
    gathers = mode == "nearest"
    if not gathers and dtype != "float32":
        value = node.emit(op.astype(value, "float64" if dtype == "float64" else "float32"))
    outside: list[tuple[int, np.ndarray]] = []
    for change in changes:
        if change.size == change.out and change.scale == 1.0 and coordinates != "tf_crop_and_resize":
            continue
        x = _coordinates(change, coordinates)
        if coordinates == "tf_crop_and_resize":
            outside.append((change.axis, (x < 0) | (x > change.size - 1)))
        positions, weights = _taps(node, x, change, mode, nearest)
        value = _along(node, value, change.axis, positions, None if gathers else weights)
    if not gathers and dtype != "float32":
        value = op.astype(value if is_float(dtype) else op.round(value), dtype)
    return _extrapolated(node, value, outside)


def _coordinates(change: _Axis, mode: str) -> np.ndarray:
    """Where each output lies on the input axis."""
    import numpy as np

    y = np.arange(change.out, dtype=np.float64)
    width, scale = change.scale * change.size, change.scale
    half_pixel = (y + 0.5) / scale - 0.5
    if mode == "half_pixel":
        return half_pixel
    if mode == "asymmetric":
        return y / scale
    if mode == "align_corners":
        return np.zeros_like(y) if width == 1 else y * (change.size - 1) / (width - 1)
    if mode == "pytorch_half_pixel":
        return np.full_like(y, -0.5) if width == 1 else half_pixel
    if mode == "half_pixel_symmetric":
        return change.size / 2 * (1 - change.out / width) + half_pixel
    if mode == "tf_half_pixel_for_nn":
        return (y + 0.5) / scale
    if mode == "tf_crop_and_resize":
        (start, end), last = change.region, change.size - 1
        if change.out == 1:
            return np.full_like(y, (start + end) * last / 2)
        return start * last + y * (end - start) * last / (change.out - 1)
    raise Unsupported(f"coordinate_transformation_mode {mode!r}")


def _taps(node: OpNode, x: np.ndarray, change: _Axis, mode: str, nearest: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (out, taps), held inside the axis, and weights (out, taps)."""
    import numpy as np

    last = change.size - 1
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(x - 0.5),
            "round_prefer_ceil": np.floor(x + 0.5),
            "floor": np.floor(x),
            "ceil": np.ceil(x),
        }[nearest]
        return np.clip(rounded, 0, last).astype(np.int32)[:, None], np.ones((len(x), 1))
    scale = min(change.scale, 1.0) if node.integer("antialias", 0) else 1.0
    radius = 1 if mode == "linear" else 2
    reach = math.ceil(radius / scale)
    positions = np.floor(x)[:, None] + np.arange(1 - reach, reach + 1)[None, :]
    distance = np.abs(x[:, None] - positions) * scale
    weights = np.clip(1 - distance, 0, 1) if mode == "linear" else _cubic(distance, _cubic_a(node))
    if node.integer("exclude_outside", 0):
        weights = np.where((positions < 0) | (positions > last), 0.0, weights)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(positions, 0, last).astype(np.int32), weights


def _cubic_a(node: OpNode) -> float:
    return float(node.attrs.get("cubic_coeff_a", -0.75))


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    import numpy as np

    d = distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _along(node: OpNode, value: Any, axis: int, positions: np.ndarray, weights: np.ndarray | None) -> Any:
    """One axis of ``value`` read at ``positions`` (out, taps), summed with ``weights``, or taken as it is."""
    from tvm import te

    out, taps = positions.shape

    def gather(x: Any, at: Any) -> Any:
        shape = [*x.shape[:axis], out, *x.shape[axis + 1 :]]
        return te.compute(shape, lambda *i: x(*i[:axis], at[i[axis], 0], *i[axis + 1 :]), name="resize")

    def interpolate(x: Any, at: Any, weight: Any) -> Any:
        shape = [*x.shape[:axis], out, *x.shape[axis + 1 :]]

        def point(*i: Any) -> Any:
            parts = [weight[i[axis], k] * x(*i[:axis], at[i[axis], k], *i[axis + 1 :]) for k in range(taps)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total

        return te.compute(shape, point, name="resize")

    table = constant(positions)
    if weights is None:
        return node.emit_te(gather, value, table, name="resize_nearest")
    dtype = str(value.ty.dtype.dtype)
    return node.emit_te(interpolate, value, table, constant(weights.astype(dtype)), name="resize_interpolate")


def _extrapolated(node: OpNode, value: Any, outside: list[tuple[int, np.ndarray]]) -> Any:
    """Points outside the input get extrapolation_value."""
    import numpy as np
    from tvm import relax

    fill = float(node.attrs.get("extrapolation_value", 0.0))
    for axis, mask in outside:
        if mask.any():
            column = [1] * node.rank(0)
            column[axis] = len(mask)
            keep = constant(np.logical_not(mask).reshape(column))
            value = node.emit(relax.op.where(keep, value, relax.const(fill, node.dtype(0))))
    return value


CONVERTERS: dict[str, Converter] = {"Resize": _resize, "Upsample": _upsample}
