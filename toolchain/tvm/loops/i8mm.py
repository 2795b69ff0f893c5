"""Products of 8-bit matrices by the instructions of Armv8.6's i8mm: ``smmla`` and ``usmmla``.

One instruction multiplies two rows of eight 8-bit values with two columns of as many, and adds to 2x2 sums of 32
bits, which lie row by row in one vector.  So an accumulator is (pair of rows, pair of columns) where that of
:mod:`~toolchain.tvm.loops.dense_int8` and :mod:`~toolchain.tvm.loops.conv_int8` is (row, four columns): as many
registers for the same tile, with half the instructions.  Rows of a convolution are neighbouring pixels.

The loop nests carry the marks of those modules and take their schedules.  Axes: ``lane`` is the place in an
accumulator, ``2 * row + column``; eight neighbouring values of the reduction are the innermost axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.intrinsics import OCTET, PAIR
from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.conv import Conv2d, columns_of, padded_image
from toolchain.tvm.loops.conv_int8 import PAIRS, ConvMarks
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np

LANES = PAIR * PAIR
"""Sums of 32 bits in a vector register of 128."""


def pack_matrix(weights: np.ndarray, vectors: int) -> np.ndarray:
    """(k, n) -> (tiles, k/8, pairs of columns, 2, 8); missing rows and columns are zero."""
    import numpy as np

    k, n = weights.shape
    tiles, parts, pairs = ceil_div(n, vectors * LANES), ceil_div(k, OCTET), vectors * LANES // PAIR
    padded = np.zeros((parts * OCTET, tiles * pairs * PAIR), weights.dtype)
    padded[:k, :n] = weights
    return np.ascontiguousarray(padded.reshape(parts, OCTET, tiles, pairs, PAIR).transpose(2, 0, 3, 4, 1))


def dense_i8mm(data: Any, weights: Any, columns: int, tile: Tile) -> Any:
    """The loop nest of a product, int32 (m, columns).

    Args:
        data: 8-bit (m, k), m static or symbolic, k a multiple of eight.
        weights: int8, packed.
        columns: n.
        tile: rows, an even number, and vectors of four columns.
    """
    from tvm import te

    tiles, parts, pairs, _, _ = (int(s) for s in weights.shape)
    m, rows = data.shape[0], tile.rows
    part, k = te.reduce_axis((0, parts), "part"), te.reduce_axis((0, OCTET), "k")
    covered = hasattr(m, "value") and int(m) % rows == 0

    def product(o: Any, outer: Any, inner: Any, lane: Any) -> Any:
        row = outer * rows + inner * PAIR + lane // PAIR
        row = row if covered else te.min(row, m - 1)
        value = data[row, part * OCTET + k].astype("int32")
        return te.sum(value * weights[o // pairs, part, o % pairs, lane % PAIR, k].astype("int32"), axis=[part, k])

    attrs = {RULE: "dense_int8", ROWS: 1, COLUMNS: rows, VECTORS: tile.vectors, PAIRS: 0}
    # Written so that the analyzer can prove that every row read exists.
    shape = (tiles * pairs, (m - 1) // rows + 1, rows // PAIR, LANES)
    acc = te.compute(shape, product, name="acc", attrs=attrs)
    return te.compute(
        (m, columns),
        lambda i, j: acc[j // PAIR, i // rows, i % rows // PAIR, i % PAIR * PAIR + j % PAIR],
        name="gather",
    )


def pack_weights(weights: np.ndarray, block: int, vectors: int) -> np.ndarray:
    """(oc, ic, kh, kw) -> (tiles, ic/8, kh, kw, pairs of channels, 2, 8); missing channels are zero.

    Those of the input are filled up to an even number of blocks of ``block``, which is four.
    """
    import numpy as np

    assert block * PAIR == OCTET
    oc, ic, kh, kw = weights.shape
    tiles, parts, pairs = ceil_div(oc, vectors * LANES), ceil_div(ic, OCTET), vectors * LANES // PAIR
    padded = np.zeros((tiles * pairs * PAIR, parts * OCTET, kh, kw), weights.dtype)
    padded[:oc, :ic] = weights
    split = padded.reshape(tiles, pairs, PAIR, parts, OCTET, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 3, 5, 6, 1, 2, 4))


def conv2d_i8mm(data: Any, weights: Any, conv: Conv2d, channels: int, marks: ConvMarks) -> Any:
    """The loop nest of a convolution, int32 (n, oc/4, oh, ow, 4).

    Args:
        data: int8 or uint8 in blocks of four channels; two neighbouring blocks are eight values of the reduction.
        weights: int8, packed.
        conv: sizes.
        channels: blocks of output channels, ``oc / 4`` rounded up.
        marks: the tile, of an even number of columns, and what padding is filled with.
    """
    from tvm import te

    _, parts, kh, kw, pairs, _, _ = (int(s) for s in weights.shape)
    n, blocks, h, w = data.shape[:4]
    tile, columns = marks.tile, marks.tile.rows
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, columns, marks.padding)
    of_group, per_group = int(blocks) // conv.groups, channels // conv.groups
    ic, k = te.reduce_axis((0, parts), "ic"), te.reduce_axis((0, OCTET), "k")
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    column_of = columns_of(padded, data, out_w, columns)
    quad = OCTET // PAIR

    def product(b: Any, o: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        x = column_of(outer, inner * PAIR + lane // PAIR)
        block = ic * PAIR + k // quad
        # An odd number of blocks: the last meets weights of zero the second time.
        block = block if of_group % PAIR == 0 else te.min(block, of_group - 1)
        block = block if conv.groups == 1 else o // PAIR // per_group * of_group + block
        row, column = y * conv.strides[0] + ky * conv.dilation[0], x * conv.strides[1] + kx * conv.dilation[1]
        value = padded[b, block, row, column, k % quad]
        weight = weights[o // pairs, ic, ky, kx, o % pairs, lane % PAIR, k]
        return te.sum(value.astype("int32") * weight.astype("int32"), axis=[ic, ky, kx, k])

    attrs = {RULE: "conv_int8", ROWS: marks.rows, COLUMNS: columns, VECTORS: tile.vectors, PAIRS: 0}
    tiles = ceil_div(channels, tile.vectors) * pairs
    shape = (n, tiles, out_h, (out_w - 1) // columns + 1, columns // PAIR, LANES)
    acc = te.compute(shape, product, name="acc", attrs=attrs)
    return te.compute(
        (n, channels, out_h, out_w, LANES),
        lambda b, o, y, x, c: acc[
            b, o * PAIR + c // PAIR, y, x // columns, x % columns // PAIR, x % PAIR * PAIR + c % PAIR
        ],
        name="gather",
    )
