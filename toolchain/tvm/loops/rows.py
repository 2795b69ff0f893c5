"""Work on rows: softmax, normalization and reductions over the last axis, each all its stages at one loop over rows.

A row is cut into chunks of a vector's lanes.  Ragged rows are copied into a buffer of whole chunks first, filled
up with the neutral element of the first stage, so that every later stage is plain vector code and no element
beyond the row is ever read; only the copy and the final store have a tail.  A sum keeps one partial sum a lane
(several vectors of them for long rows) over the row, and adds them up by halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.tvm.loops import RULE

STAGE = "toolchain.stage"
"""Marks the stages of a row kernel: ``"load"``, ``"chunks"`` (element-wise), ``"reduce"``, ``"fold"``, ``"row"``."""

ROW_TILE = "toolchain.row_tile"
"""Rows that share a loop iteration, on the last stage."""

_BLOCK = 4
"""Rows taken together when their length is known only at run time: buffers are then allocated once for all."""

_LONG = 1024
"""From this length a sum has several vectors of partial sums, to hide the latency of an addition."""

_PARTIAL = (4, 2, 1)

_NEUTRAL = {"sum": 0.0, "mean": 0.0, "max": float("-inf"), "min": float("inf")}

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


@dataclass(frozen=True, slots=True)
class Space:
    """Rows of a tensor (*outer, m, k) cut into chunks.

    Attributes:
        outer: sizes of the axes before the rows.
        m: number of rows.
        k: elements of a row.
        lanes: elements of a chunk.
        tile: rows of an iteration.
        chunks: chunks of a row.
        partial: vectors of partial sums.
    """

    outer: tuple[Any, ...]
    m: Any
    k: Any
    lanes: int
    tile: int
    chunks: Any
    partial: int

    @property
    def padded(self) -> bool:
        """Whether the last chunk has elements beyond the row."""
        return not (isinstance(self.k, int) and self.chunks * self.lanes == self.k)

    @property
    def rows(self) -> tuple[Any, ...]:
        """Sizes of a value with one element a row."""
        return (*self.outer, (self.m - 1) // self.tile + 1, self.tile)

    def valid(self, chunk: Any, lane: Any) -> Any:
        """Whether the element is one of the row."""
        return chunk * self.lanes + lane < self.k


def space_of(shape: Sequence[Any], lanes: int) -> Space:
    """How to walk a tensor of ``shape`` (at least two axes), static or symbolic."""
    *outer, m, k = (int(size) if hasattr(size, "value") else size for size in shape)
    if not isinstance(k, int):
        return Space(tuple(outer), m, k, lanes, _BLOCK, (k - 1) // lanes + 1, 1)
    chunks = -(-k // lanes)
    partial = _PARTIAL[0] if k >= _LONG else next(p for p in _PARTIAL if chunks % p == 0)
    return Space(tuple(outer), m, k, lanes, 1, -(-chunks // partial) * partial, partial)


def load(space: Space, x: Any, fill: float) -> Any:
    """The rows of ``x`` as float32 in whole chunks; ``fill`` beyond their end."""
    from tvm import te, tirx

    def value(*at: Any) -> Any:
        *outer, tile, row, chunk, lane = at
        i = tile * space.tile + row
        i = i if space.tile == 1 else te.min(i, space.m - 1)
        element = x[(*outer, i, chunk * space.lanes + lane)].astype("float32")
        if not space.padded:
            return element
        return tirx.if_then_else(space.valid(chunk, lane), element, tirx.const(fill, "float32"))

    return te.compute((*space.rows, space.chunks, space.lanes), value, name="row_load", attrs={STAGE: "load"})


def chunks(space: Space, value: Callable[..., Any], name: str) -> Any:
    """A value of the rows' elements: ``value(row, chunk, lane)`` with ``row`` the indices of one."""
    from tvm import te

    return te.compute(
        (*space.rows, space.chunks, space.lanes),
        lambda *at: value(at[:-2], at[-2], at[-1]),
        name=name,
        attrs={STAGE: "chunks"},
    )


def reduce(space: Space, value: Callable[..., Any], how: str, name: str) -> Any:
    """``sum``, ``max``, ``min`` or ``prod`` of ``value(row, chunk, lane)`` over each row, one element a row."""
    from tvm import te, tirx

    # TVM's own extrema start from the largest finite numbers instead of infinities.
    join = {"sum": lambda a, b: a + b, "max": lambda a, b: tirx.max(a, b), "min": lambda a, b: tirx.min(a, b)}[how]
    reducer = te.comm_reducer(join, lambda dtype: tirx.const(_NEUTRAL[how], dtype), name=how)
    step = te.reduce_axis((0, space.chunks // space.partial), "c")
    width = space.partial * space.lanes

    def partial(*at: Any) -> Any:
        *row, lane = at
        chunk = step * space.partial + lane // space.lanes
        return reducer(value(tuple(row), chunk, lane % space.lanes), axis=step)

    result = te.compute((*space.rows, width), partial, name=f"{name}_partial", attrs={STAGE: "reduce"})
    if space.partial > 1:
        result = _fold(space, result, space.lanes, space.partial, join, f"{name}_lanes")
    width = space.lanes
    while width > 1:
        width //= 2
        result = _fold(space, result, width, 2, join, f"{name}_{width}")
    return te.compute(space.rows, lambda *row: result[(*row, 0)], name=name, attrs={STAGE: "row"})


def _fold(space: Space, whole: Any, width: int, parts: int, join: Callable[[Any, Any], Any], name: str) -> Any:
    """``parts`` neighbouring stretches of ``width`` elements joined."""
    from tvm import te

    def joined(*at: Any) -> Any:
        *row, lane = at
        stretches = [whole[(*row, lane + part * width)] for part in range(parts)]
        return functools.reduce(join, stretches)

    return te.compute((*space.rows, width), joined, name=name, attrs={STAGE: "fold"})


def per_row(space: Space, value: Callable[..., Any], name: str) -> Any:
    """One element a row: ``value(row)``."""
    from tvm import te

    return te.compute(space.rows, lambda *row: value(row), name=name, attrs={STAGE: "row"})


def store(space: Space, value: Callable[..., Any], dtype: str) -> Any:
    """The result (*outer, m, k) in ``dtype``: ``value(row, chunk, lane, j)`` with ``j`` the place in the row."""
    from tvm import te

    def element(*at: Any) -> Any:
        *outer, i, j = at
        row = (*outer, i // space.tile, i % space.tile)
        return value(row, j // space.lanes, j % space.lanes, j).astype(dtype)

    return te.compute((*space.outer, space.m, space.k), element, name="row_store", attrs=_marks(space))


def store_rows(space: Space, value: Callable[..., Any], dtype: str, *, keep: bool) -> Any:
    """The result (*outer, m), or (*outer, m, 1) with ``keep``, in ``dtype``: ``value(row)``."""
    from tvm import te

    def element(*at: Any) -> Any:
        outer, i = at[: len(space.outer)], at[len(space.outer)]
        return value((*outer, i // space.tile, i % space.tile)).astype(dtype)

    shape = (*space.outer, space.m, 1) if keep else (*space.outer, space.m)
    return te.compute(shape, element, name="row_store", attrs=_marks(space))


def _marks(space: Space) -> dict[str, Any]:
    return {RULE: "rows", ROW_TILE: space.tile}


def exp_negative(x: Any) -> Any:
    """e^x of a float32 up to 0: 0 below -87.3, and NaN of NaN.

    Argument reduction and polynomial of the Cephes library; the power of two comes from the bits that adding
    1.5 * 2^23 leaves in the lowest places.
    """
    from tvm import tirx

    def constant(value: float) -> Any:
        return tirx.const(value, "float32")

    magic, whole, value, rest = (tirx.Var(name, "float32") for name in ("magic", "whole", "value", "rest"))
    polynomial = constant(_EXP[0])
    for coefficient in (*_EXP[1:], 1.0, 1.0):
        polynomial = polynomial * rest + constant(coefficient)
    power = tirx.reinterpret("int32", magic) << tirx.const(23, "int32")
    result = tirx.reinterpret("float32", tirx.reinterpret("int32", polynomial) + power)
    result = tirx.Select(value < constant(-87.3), constant(0.0), result)
    reduced = value - whole * constant(0.693359375) - whole * constant(-2.12194440e-4)
    result = tirx.Let(rest, reduced, result)
    result = tirx.Let(whole, magic - constant(12582912.0), result)
    result = tirx.Let(magic, value * constant(1.44269504088896341) + constant(12582912.0), result)
    return tirx.Let(value, x, result)


def softmax(x: Any, lanes: int, *, log: bool = False) -> Any:
    """Softmax, or its logarithm, of each row: values less the greatest, so that no exponential overflows."""
    from tvm import te

    space = space_of(x.shape, lanes)
    data = load(space, x, float("-inf"))
    greatest = reduce(space, lambda row, c, v: data[(*row, c, v)], "max", "greatest")
    powers = chunks(space, lambda row, c, v: exp_negative(data[(*row, c, v)] - greatest[row]), "powers")
    total = reduce(space, lambda row, c, v: powers[(*row, c, v)], "sum", "total")
    if log:
        shift = per_row(space, lambda row: greatest[row] + te.log(total[row]), "shift")
        return store(space, lambda row, c, v, _: data[(*row, c, v)] - shift[row], x.dtype)
    share = per_row(space, lambda row: 1.0 / total[row], "share")
    return store(space, lambda row, c, v, _: powers[(*row, c, v)] * share[row], x.dtype)


def layer_norm(x: Any, scale: Any, bias: Any, lanes: int, epsilon: float) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias; ``scale`` and ``bias`` (k,) or None."""
    from tvm import te, tirx

    space = space_of(x.shape, lanes)
    data = load(space, x, 0.0)
    count = tirx.const(1.0, "float32") / tirx.Cast("float32", space.k)
    total = reduce(space, lambda row, c, v: data[(*row, c, v)], "sum", "total")
    mean = per_row(space, lambda row: total[row] * count, "mean")

    def square(row: Any, c: Any, v: Any) -> Any:
        centred = data[(*row, c, v)] - mean[row]
        if space.padded:
            centred = tirx.Select(space.valid(c, v), centred, tirx.const(0.0, "float32"))
        return centred * centred

    squares = reduce(space, square, "sum", "squares")
    factor = per_row(space, lambda row: 1.0 / te.sqrt(squares[row] * count + epsilon), "factor")
    return store(
        space,
        lambda row, c, v, j: _affine((data[(*row, c, v)] - mean[row]) * factor[row], scale, bias, j),
        x.dtype,
    )


def rms_norm(x: Any, scale: Any, lanes: int, epsilon: float) -> Any:
    """Rows divided by their root mean square: x / sqrt(mean of squares + epsilon) * scale."""
    from tvm import te, tirx

    space = space_of(x.shape, lanes)
    data = load(space, x, 0.0)
    count = tirx.const(1.0, "float32") / tirx.Cast("float32", space.k)
    squares = reduce(space, lambda row, c, v: data[(*row, c, v)] * data[(*row, c, v)], "sum", "squares")
    factor = per_row(space, lambda row: 1.0 / te.sqrt(squares[row] * count + epsilon), "factor")
    return store(space, lambda row, c, v, j: _affine(data[(*row, c, v)] * factor[row], scale, None, j), x.dtype)


def _affine(value: Any, scale: Any, bias: Any, j: Any) -> Any:
    if scale is not None:
        value = value * scale[j].astype("float32")
    return value if bias is None else value + bias[j].astype("float32")


def reduction(x: Any, lanes: int, how: str, *, keep: bool) -> Any:
    """``sum``, ``mean``, ``max``, ``min`` or ``variance`` of each row."""
    from tvm import tirx

    space = space_of(x.shape, lanes)
    data = load(space, x, _NEUTRAL[how])
    total = reduce(space, lambda row, c, v: data[(*row, c, v)], "sum" if how == "mean" else how, "total")
    if how != "mean":
        return store_rows(space, lambda row: total[row], x.dtype, keep=keep)
    count = tirx.const(1.0, "float32") / tirx.Cast("float32", space.k)
    return store_rows(space, lambda row: total[row] * count, x.dtype, keep=keep)
