"""Products of two computed operands, (..., m, k) and (..., k, n), of any sizes, static or symbolic.

A panel of columns is packed when it is needed, filled up with zeros to whole vectors, and used for all rows;
packing reads each value of it once, the product once for every tile of rows.  Rows beyond the last read the last
one again and are not stored.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.rows import STAGE
from toolchain.tvm.tiles import Tile

Axes = tuple[str | int, ...]
"""What the axes of a tensor are: the name of an index, or a number: that place of an axis."""


def read(tensor: Any, axes: Axes, at: dict[str, Any]) -> Any:
    """The element of ``tensor`` at the named indices ``at``."""
    return tensor[tuple(axis if isinstance(axis, int) else at[axis] for axis in axes)]


def size_of(tensors: list[tuple[Any, Axes]], name: str) -> Any:
    """Size of the axis ``name`` in the first tensor that has it."""
    tensor, axes = next(pair for pair in tensors if name in pair[1])
    size = tensor.shape[axes.index(name)]
    return int(size) if hasattr(size, "value") else size


def product(a: Any, b: Any, axes: tuple[Axes, Axes], batch: list[str], tile: Tile, lanes: int) -> Any:
    """The loop nest: (*batch, m, n), of float32 whatever the operands are stored in.

    Args:
        a: left operand, axes named by ``batch``, ``"m"`` and ``"k"`` in any order; numbers where it broadcasts.
        b: right operand, ``batch``, ``"k"`` and ``"n"``.
        axes: what the operands' axes are.
        batch: names of the axes of the result before the last two; one of none has a size of 1.
        tile: rows and vectors of a tile.
        lanes: elements of a vector.
    """
    from tvm import te

    tensors = [(a, axes[0]), (b, axes[1])]
    sizes = [size_of(tensors, name) if any(name in x for x in axes) else 1 for name in batch]
    m, k, n = (size_of(tensors, name) for name in "mkn")
    width = tile.vectors * lanes
    panels = (n - 1) // width + 1
    covered = isinstance(m, int) and m % tile.rows == 0

    shape = (*sizes, panels, k, width)
    panel = _packed(b, axes[1], batch, shape, n)
    step = te.reduce_axis((0, k), "k")

    def summed(*at: Any) -> Any:
        *outer, place, tiles, row, lane = at
        i = tiles * tile.rows + row
        named = dict(zip(batch, outer, strict=True)) | {"m": i if covered else te.min(i, m - 1), "k": step}
        return te.sum(read(a, axes[0], named).astype("float32") * panel[(*outer, place, step, lane)], axis=step)

    marks = {RULE: "product", ROWS: 1, COLUMNS: tile.rows, VECTORS: tile.vectors}
    shape = (*sizes, panels, (m - 1) // tile.rows + 1, tile.rows, width)
    acc = te.compute(shape, summed, name="acc", attrs=marks)

    def gathered(*at: Any) -> Any:
        *outer, i, j = at
        return acc[(*outer, j // width, i // tile.rows, i % tile.rows, j % width)]

    return te.compute((*sizes, m, n), gathered, name="gather")


def _packed(b: Any, axes: Axes, batch: list[str], shape: tuple[Any, ...], columns: Any) -> Any:
    """Panels of columns, float32 (*batch, panels, k, width), zero beyond the last column."""
    from tvm import te, tirx

    width = shape[-1]
    ragged = not isinstance(columns, int) or columns % width != 0

    def packed(*at: Any) -> Any:
        *outer, panel, depth, place = at
        named = dict(zip(batch, outer, strict=True)) | {"k": depth, "n": panel * width + place}
        element = read(b, axes, named).astype("float32")
        if not ragged:
            return element
        return tirx.if_then_else(named["n"] < columns, element, tirx.const(0.0, "float32"))

    return te.compute(shape, packed, name="packed_columns", attrs={STAGE: "pack"})
