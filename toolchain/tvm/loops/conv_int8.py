"""Convolutions of 8-bit data and weights with 32-bit sums.

Layouts: data (n, ic/b, h, w, b) with b the machine's number of int32 lanes v, or 4 for a first layer of few
channels; weights (tile of output channels, ic/b, kh, kw, b/q, vectors, q/p, v, p); output int32 (n, oc/v, oh, ow, v).
q neighbouring input channels are multiplied and added together, 4, or 1 on a machine without instructions for that;
p of them lie together (:func:`toolchain.tvm.intrinsics.grouping`).
Padding is filled with the zero point of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.intrinsics import FITS, NEON, SATURATES
from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops import conv as float_conv
from toolchain.tvm.loops.conv import Conv2d, columns_of, in_tiles, padded_image
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np

PAIRS = "toolchain.pairs"
"""Block annotation: whether two neighbouring products fit in 16 bits."""


@dataclass(frozen=True, slots=True)
class ConvMarks:
    """How a convolution is computed.

    Attributes:
        rows: image rows of a tile.
        tile: columns and vectors of a tile.
        padding: the value of padding, the zero point of the data.
        pairs: FITS or SATURATES.
    """

    rows: int
    tile: Tile
    padding: int
    pairs: int


def pack_weights(
    weights: np.ndarray, lanes: int, block: int, vectors: int, quad: int, pair: int | None = None
) -> np.ndarray:
    """(oc, ic, kh, kw) -> (tiles, ic/block, kh, kw, block/quad, vectors, quad/pair, lanes, pair).

    Missing channels are zero; ``pair`` is ``quad`` if not given.
    """
    import numpy as np

    oc, ic, kh, kw = weights.shape
    tiles, blocks = ceil_div(oc, vectors * lanes), ceil_div(ic, block)
    padded = np.zeros((tiles * vectors * lanes, blocks * block, kh, kw), weights.dtype)
    padded[:oc, :ic] = weights
    pair = pair or quad
    split = padded.reshape(tiles, vectors, lanes, blocks, block // quad, quad // pair, pair, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 3, 7, 8, 4, 1, 5, 2, 6))


def products_fit(packed: np.ndarray, dot: str) -> int:
    """FITS if the sums that ``dot`` makes in 16 bits never exceed them, else SATURATES."""
    if dot not in NEON:
        return pairs_fit(packed)
    # s8 data: 128 * (127 + 128) fits, 128 * (128 + 128) does not.
    lowest = packed == -128
    return SATURATES if (lowest[..., 0, :, :] & lowest[..., 1, :, :]).any() else FITS


def pairs_fit(packed: np.ndarray) -> int:
    """FITS if u8 data times two neighbouring weights (last axis) never exceeds 16 bits, else SATURATES."""
    import numpy as np

    if packed.shape[-1] < 2:
        return FITS
    left, right = packed[..., 0::2], packed[..., 1::2]
    highest = np.add(np.maximum(left, 0), np.maximum(right, 0), dtype=np.int16).max()
    lowest = np.add(np.minimum(left, 0), np.minimum(right, 0), dtype=np.int16).min()
    return FITS if int(highest) * 255 <= 32767 and int(lowest) * 255 >= -32768 else SATURATES


def conv2d_int8(data: Any, weights: Any, conv: Conv2d, channels: int, marks: ConvMarks) -> Any:
    """The loop nest.

    Args:
        data: int8 or uint8 in blocked layout.
        weights: int8, packed.
        conv: sizes.
        channels: blocks of output channels, ``oc / v`` rounded up.
        marks: the tile, what padding is filled with, and whether pairs fit.
    """
    from tvm import te

    _, blocks, kh, kw, parts, _, pairs, lanes, pair = (int(s) for s in weights.shape)
    quad = pairs * pair
    n, h, w = data.shape[0], data.shape[2], data.shape[3]
    tile = marks.tile
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, tile.rows, marks.padding)
    per_group = channels // conv.groups
    ic, part, k = (te.reduce_axis((0, e), name) for e, name in ((blocks, "ic"), (parts, "part"), (quad, "k")))
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    column_of = columns_of(padded, data, out_w, tile.rows)

    def product(b: Any, o: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        x = column_of(outer, inner)
        first = ic if conv.groups == 1 else o // per_group * blocks + ic
        row, column = y * conv.strides[0] + ky * conv.dilation[0], x * conv.strides[1] + kx * conv.dilation[1]
        value = padded[b, first, row, column, part * quad + k]
        weight = weights[o // tile.vectors, ic, ky, kx, part, o % tile.vectors, k // pair, lane, k % pair]
        return te.sum(value.astype("int32") * weight.astype("int32"), axis=[ic, ky, kx, part, k])

    attrs = {RULE: "conv_int8", ROWS: marks.rows, COLUMNS: tile.rows, VECTORS: tile.vectors, PAIRS: marks.pairs}
    tiles = ceil_div(channels, tile.vectors) * tile.vectors
    return in_tiles(product, (n, tiles, out_h, out_w, lanes), channels, tile.rows, attrs)


def pack_depthwise(weights: np.ndarray, lanes: int) -> np.ndarray:
    """(c, 1, kh, kw) -> int16 (c/lanes, kh, kw, lanes); missing channels are zero.

    16 bits, so that products of two become one instruction where the target multiplies 16-bit pairs.
    """
    import numpy as np

    return float_conv.pack_depthwise(weights.astype(np.int16), lanes)


def depthwise2d_int8(data: Any, weights: Any, sizes: Conv2d, columns: int, padding: int) -> Any:
    """One filter a channel: data (n, c/v, h, w, v), weights int16 (c/v, kh, kw, v)."""
    return float_conv.depthwise2d(data, weights, sizes, columns, padding, "int32")
