"""Matrix product with constant weights: data (m, k), weights packed as (tile of columns, k, vectors, v).

The product runs over whole tiles: rows beyond the last read the last one again and are not stored, columns
beyond the last meet weights of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np


def pack_matrix(weights: np.ndarray, lanes: int, vectors: int) -> np.ndarray:
    """(k, n) -> (tiles, k, vectors, lanes); missing columns are zero."""
    import numpy as np

    k, n = weights.shape
    tiles = ceil_div(n, vectors * lanes)
    padded = np.zeros((k, tiles * vectors * lanes), weights.dtype)
    padded[:, :n] = weights
    return np.ascontiguousarray(padded.reshape(k, tiles, vectors, lanes).transpose(1, 0, 2, 3))


def dense(data: Any, weights: Any, columns: int, tile: Tile, sums: str) -> Any:
    """The loop nest.

    Args:
        data: (m, k), m static or symbolic.
        weights: packed.
        columns: n.
        tile: rows and vectors of a tile.
        sums: dtype of products and sums: that of the operands, or a wider one.
    """
    from tvm import te

    tiles, depth, vectors, lanes = (int(s) for s in weights.shape)
    m = data.shape[0]
    k = te.reduce_axis((0, depth), "k")
    covered = hasattr(m, "value") and int(m) % tile.rows == 0

    def product(o: Any, outer: Any, inner: Any, lane: Any) -> Any:
        row = outer * tile.rows + inner
        row = row if covered else te.min(row, m - 1)
        weight = weights[o // vectors, k, o % vectors, lane]
        return te.sum(data[row, k].astype(sums) * weight.astype(sums), axis=k)

    marks = {RULE: "dense", ROWS: 1, COLUMNS: tile.rows, VECTORS: vectors}
    # Written so that the analyzer can prove that every row read exists.
    shape = (tiles * vectors, (m - 1) // tile.rows + 1, tile.rows, lanes)
    acc = te.compute(shape, product, name="acc", attrs=marks)
    return te.compute(
        (m, columns),
        lambda i, j: acc[j // lanes, i // tile.rows, i % tile.rows, j % lanes],
        name="gather",
    )
