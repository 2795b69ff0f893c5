"""Matrix product of 8-bit data (m, k) with constant 8-bit weights, summed in 32 bits.

Weights are packed as (tile of columns, k/q, vectors, q/p, v, p): q neighbouring rows of a column are multiplied and
added together, 4 where there are instructions for that, else 1; p of them lie together
(:func:`toolchain.tvm.intrinsics.grouping`).  The rows that k is filled up with have weights of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.conv_int8 import PAIRS
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np


def pack_matrix(weights: np.ndarray, lanes: int, vectors: int, quad: int, pair: int | None = None) -> np.ndarray:
    """(k, n) -> (tiles, k/quad, vectors, quad/pair, lanes, pair); missing rows and columns are zero.

    ``pair`` is ``quad`` if not given.
    """
    import numpy as np

    k, n = weights.shape
    tiles, parts = ceil_div(n, vectors * lanes), ceil_div(k, quad)
    padded = np.zeros((parts * quad, tiles * vectors * lanes), weights.dtype)
    padded[:k, :n] = weights
    pair = pair or quad
    split = padded.reshape(parts, quad // pair, pair, tiles, vectors, lanes)
    return np.ascontiguousarray(split.transpose(3, 0, 4, 1, 5, 2))


def dense_int8(data: Any, weights: Any, columns: int, tile: Tile, pairs: int) -> Any:
    """The loop nest, int32 (m, columns).

    Args:
        data: (m, k), m static or symbolic, k a multiple of the weights' q.
        weights: packed.
        columns: n.
        tile: rows and vectors of a tile.
        pairs: FITS or SATURATES.
    """
    from tvm import te

    tiles, parts, vectors, groups, lanes, pair = (int(s) for s in weights.shape)
    quad = groups * pair
    m = data.shape[0]
    part, k = te.reduce_axis((0, parts), "part"), te.reduce_axis((0, quad), "k")
    covered = hasattr(m, "value") and int(m) % tile.rows == 0

    def product(o: Any, outer: Any, inner: Any, lane: Any) -> Any:
        row = outer * tile.rows + inner
        row = row if covered else te.min(row, m - 1)
        value = data[row, part * quad + k].astype("int32")
        weight = weights[o // vectors, part, o % vectors, k // pair, lane, k % pair]
        return te.sum(value * weight.astype("int32"), axis=[part, k])

    attrs = {RULE: "dense_int8", ROWS: 1, COLUMNS: tile.rows, VECTORS: vectors, PAIRS: pairs}
    # Written so that the analyzer can prove that every row read exists.
    shape = (tiles * vectors, (m - 1) // tile.rows + 1, tile.rows, lanes)
    acc = te.compute(shape, product, name="acc", attrs=attrs)
    return te.compute(
        (m, columns),
        lambda i, j: acc[j // lanes, i // tile.rows, i % tile.rows, j % lanes],
        name="gather",
    )
