"""Reductions over constant axes, of empty inputs too, and running sums and products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from toolchain.tvm.operators.elementwise import is_float
from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant


def _reduce(node: OpNode) -> Any:
    """Over all axes if none are given, or over none with noop_with_empty_axes."""
    import numpy as np

    x, rank = node.input(0), node.rank(0)
    axes = node.attrs.get("axes")
    if axes is None and node.has(1):
        axes = [int(v) for v in node.constant(1, "axes").reshape(-1)]
    keep = bool(node.integer("keepdims", 1))
    name = node.operator.removeprefix("Reduce")
    if not axes and node.integer("noop_with_empty_axes", 0):
        return _POST[name](node, _PRE[name](x)) if name in _PRE else x
    reduced = sorted({a % rank for a in axes}) if axes else list(range(rank))
    if not reduced:
        return _POST[name](node, _PRE[name](x)) if name in _PRE else x
    sizes = _sizes(node)
    if any(sizes[a] == 0 for a in reduced if sizes is not None and sizes[a] is not None):
        kept = [(1 if a in reduced else s) for a, s in enumerate(node.shape(0)) if keep or a not in reduced]
        return constant(np.full(kept, _empty(node, name), node.dtype(0)))
    return _of_values(node, name, x, reduced, keep)


def _sizes(node: OpNode) -> list[int | None]:
    return [getattr(value, "value", None) for value in node.input(0).ty.shape.values]


def _of_values(node: OpNode, name: str, x: Any, axes: list[int], keep: bool) -> Any:
    from tvm import relax

    op, dtype = relax.op, node.dtype(0)
    if name in ("Max", "Min"):
        function = op.max if name == "Max" else op.min
        if dtype == "bool":
            return op.astype(function(op.astype(x, "int8"), axes, keep), "bool")
        return _extremum(node, axes, keep) if is_float(dtype) else function(x, axes, keep)
    if name == "Prod":
        return op.prod(x, axes, keep)
    if name == "Mean":
        if is_float(dtype):
            return op.mean(x, axes, keep)
        total = op.sum(op.astype(x, "int64"), axes, keep)
        count = math.prod(node.shape(0)[a] for a in axes)
        mean = op.divide(op.astype(total, "float64"), relax.const(count, "float64"))
        return op.astype(op.trunc(mean), dtype)
    if name == "LogSumExp":
        wide = op.astype(x, "float32") if dtype == "float16" else x
        top = node.emit(op.max(wide, axes, True))
        # Where all are minus infinity the difference would be no number.
        top = node.emit(op.where(op.isinf(top), op.zeros_like(top), top))
        total = op.log(op.sum(op.exp(op.subtract(wide, top)), axes, True))
        result = node.emit(op.add(total, top))
        result = result if keep else op.squeeze(result, axes)
        return op.astype(result, dtype) if dtype == "float16" else result
    before = _PRE.get(name, lambda value: value)
    inner = before(x)
    # A float16 sum of squares soon exceeds its range.
    if dtype == "float16" and name in ("L2", "SumSquare"):
        inner = before(op.astype(x, "float32"))
        return op.astype(_after(node, name, op.sum(inner, axes, keep), "float32"), dtype)
    return _after(node, name, op.sum(inner, axes, keep), dtype)


def _extremum(node: OpNode, axes: list[int], keep: bool) -> Any:
    """The largest or smallest of floats, from an infinity on: TVM's starts from a finite number instead."""
    from tvm import te, tirx

    largest = node.operator == "ReduceMax"
    first = -math.inf if largest else math.inf
    reducer = te.comm_reducer(
        (lambda a, b: tirx.max(a, b)) if largest else (lambda a, b: tirx.min(a, b)),
        lambda dtype: tirx.const(first, dtype),
        name="max" if largest else "min",
    )

    def compute(x: Any) -> Any:
        taps = {a: te.reduce_axis((0, x.shape[a]), f"k{a}") for a in axes}
        rank = len(x.shape)
        kept = [a for a in range(rank) if keep or a not in taps]

        def at(*i: Any) -> Any:
            place = dict(zip(kept, i, strict=True))
            return reducer(x(*(taps.get(a, place.get(a)) for a in range(rank))), axis=list(taps.values()))

        return te.compute([1 if a in taps else x.shape[a] for a in kept], at, name=node.operator.lower())

    return node.emit_te(compute, node.input(0), name=node.operator.lower())


def _after(node: OpNode, name: str, total: Any, dtype: str) -> Any:
    from tvm import relax

    if name == "LogSum":
        return relax.op.log(total)
    if name == "L2":
        if is_float(dtype):
            return relax.op.sqrt(total)
        return relax.op.astype(relax.op.sqrt(relax.op.astype(total, "float64")), dtype)
    return total


def _square(value: Any) -> Any:
    from tvm import relax

    return relax.op.multiply(value, value)


def _absolute(value: Any) -> Any:
    from tvm import relax

    return relax.op.abs(value)


def _same(value: Any) -> Any:
    return value


_PRE: dict[str, Callable[[Any], Any]] = {"L1": _absolute, "L2": _square, "SumSquare": _square, "LogSum": _same}
"""What happens to each element before the sum."""

_POST: dict[str, Callable[[OpNode, Any], Any]] = {
    "L1": lambda _node, value: value,
    "L2": lambda node, value: _after(node, "L2", value, node.dtype(0)),
    "SumSquare": lambda _node, value: value,
    "LogSum": lambda node, value: _after(node, "LogSum", value, node.dtype(0)),
}
"""What happens to the sum of one element."""


def _empty(node: OpNode, name: str) -> float | bool | int:
    """The reduction of no elements, as ONNX defines it."""
    import numpy as np

    dtype = node.dtype(0)
    if name in ("Max", "Min"):
        if dtype == "bool":
            return name == "Min"
        if is_float(dtype):
            return -math.inf if name == "Max" else math.inf
        info = np.iinfo(dtype)
        return int(info.min if name == "Max" else info.max)
    if name in ("LogSum", "LogSumExp"):
        return -math.inf
    if name == "Mean":
        return math.nan
    return 1 if name == "Prod" else 0


def _cumulative(node: OpNode) -> Any:
    """CumSum and CumProd along a constant axis."""
    from tvm import relax

    op, dtype = relax.op, node.dtype(0)
    axis = int(node.constant(1, "the axis").reshape(-1)[0]) % node.rank(0)
    function = op.cumsum if node.operator == "CumSum" else op.cumprod
    exclusive, reverse = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
    x = node.emit(op.flip(node.input(0), axis)) if reverse else node.input(0)
    result = node.emit(function(x, axis, dtype, exclusive))
    return op.flip(result, axis) if reverse else result


def _log_sum_needs_float(node: OpNode) -> Any:
    if not is_float(node.dtype(0)):
        raise Unsupported("the logarithm of integers")
    return _reduce(node)


_NAMES = ("Sum", "Max", "Min", "Mean", "Prod", "L1", "L2", "SumSquare")

CONVERTERS: dict[str, Converter] = {
    **{f"Reduce{name}": _reduce for name in _NAMES},
    "ReduceLogSum": _log_sum_needs_float,
    "ReduceLogSumExp": _log_sum_needs_float,
    "CumProd": _cumulative,
    "CumSum": _cumulative,
}
