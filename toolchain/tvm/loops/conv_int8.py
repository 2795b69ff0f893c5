"""Convolutions of 8-bit data and weights with 32-bit sums.

Layouts: data (n, ic/b, h, w, b) with b the machine's number of int32 lanes v, or 4 for a first layer of few
channels; weights (tile of output channels, ic/b, kh, kw, b/q, vectors, v, q); output int32 (n, oc/v, oh, ow, v).
q neighbouring input channels are multiplied and added by one instruction: 4, or 1 on a machine without one.
Padding is filled with the zero point of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.intrinsics import FITS, SATURATES
from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.conv import Conv2d, padded_image
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


def pack_weights(weights: np.ndarray, lanes: int, block: int, vectors: int, quad: int) -> np.ndarray:
    """(oc, ic, kh, kw) -> (tiles, ic/block, kh, kw, block/quad, vectors, lanes, quad); missing channels are zero."""
    import numpy as np

    oc, ic, kh, kw = weights.shape
    tiles, blocks = ceil_div(oc, vectors * lanes), ceil_div(ic, block)
    padded = np.zeros((tiles * vectors * lanes, blocks * block, kh, kw), weights.dtype)
    padded[:oc, :ic] = weights
    split = padded.reshape(tiles, vectors, lanes, blocks, block // quad, quad, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 3, 6, 7, 4, 1, 2, 5))


def pairs_fit(packed: np.ndarray) -> int:
    """FITS if u8 data times two neighbouring weights (last axis) never exceeds 16 bits, else SATURATES."""
    import numpy as np

    if packed.shape[-1] < 2:
        return FITS
    pairs = packed.reshape(-1, 2).astype(np.int32) * 255
    highest, lowest = np.maximum(pairs, 0).sum(1).max(), np.minimum(pairs, 0).sum(1).min()
    return FITS if highest <= 32767 and lowest >= -32768 else SATURATES


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

    _, blocks, kh, kw, parts, _, lanes, quad = (int(s) for s in weights.shape)
    n, h, w = data.shape[0], data.shape[2], data.shape[3]
    tile = marks.tile
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, tile.rows, marks.padding)
    per_group = channels // conv.groups
    ic, part, k = (te.reduce_axis((0, e), name) for e, name in ((blocks, "ic"), (parts, "part"), (quad, "k")))
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    covered = (isinstance(out_w, int) or hasattr(out_w, "value")) and int(out_w) % tile.rows == 0

    def product(b: Any, o: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        x = outer * tile.rows + inner
        if not covered and padded.same_as(data):
            x = te.min(x, out_w - 1)
        first = ic if conv.groups == 1 else o // per_group * blocks + ic
        row, column = y * conv.strides[0] + ky * conv.dilation[0], x * conv.strides[1] + kx * conv.dilation[1]
        value = padded[b, first, row, column, part * quad + k]
        weight = weights[o // tile.vectors, ic, ky, kx, part, o % tile.vectors, lane, k]
        return te.sum(value.astype("int32") * weight.astype("int32"), axis=[ic, ky, kx, part, k])

    attrs = {RULE: "conv_int8", ROWS: marks.rows, COLUMNS: tile.rows, VECTORS: tile.vectors, PAIRS: marks.pairs}
    tiles = ceil_div(channels, tile.vectors) * tile.vectors
    shape = (n, tiles, out_h, (out_w - 1) // tile.rows + 1, tile.rows, lanes)
    acc = te.compute(shape, product, name="acc", attrs=attrs)
    return te.compute(
        (n, channels, out_h, out_w, lanes),
        lambda b, o, y, x, lane: acc[b, o, y, x // tile.rows, x % tile.rows, lane],
        name="gather",
    )


def pack_depthwise(weights: np.ndarray, lanes: int) -> np.ndarray:
    """(c, 1, kh, kw) -> int16 (c/lanes, kh, kw, lanes); missing channels are zero.

    16 bits, so that products of two become one instruction where the target multiplies 16-bit pairs.
    """
    import numpy as np

    channels, _, kh, kw = weights.shape
    padded = np.zeros((ceil_div(channels, lanes) * lanes, kh, kw), np.int16)
    padded[:channels] = weights[:, 0]
    return np.ascontiguousarray(padded.reshape(-1, lanes, kh, kw).transpose(0, 2, 3, 1))


def depthwise2d_int8(data: Any, weights: Any, conv: Conv2d, columns: int, padding: int) -> Any:
    """One filter a channel: data (n, c/v, h, w, v), weights int16 (c/v, kh, kw, v)."""
    from tvm import te

    blocks, kh, kw, lanes = (int(s) for s in weights.shape)
    n, h, w = data.shape[0], data.shape[2], data.shape[3]
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, columns, padding)
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    covered = (isinstance(out_w, int) or hasattr(out_w, "value")) and int(out_w) % columns == 0

    def product(b: Any, c: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        x = outer * columns + inner
        if not covered and padded.same_as(data):
            x = te.min(x, out_w - 1)
        row, column = y * conv.strides[0] + ky * conv.dilation[0], x * conv.strides[1] + kx * conv.dilation[1]
        value = padded[b, c, row, column, lane].astype("int32")
        return te.sum(value * weights[c, ky, kx, lane].astype("int32"), axis=[ky, kx])

    attrs = {RULE: "depthwise", ROWS: 1, COLUMNS: columns, VECTORS: 1}
    shape = (n, blocks, out_h, (out_w - 1) // columns + 1, columns, lanes)
    acc = te.compute(shape, product, name="acc", attrs=attrs)
    return te.compute(
        (n, blocks, out_h, out_w, lanes),
        lambda b, c, y, x, lane: acc[b, c, y, x // columns, x % columns, lane],
        name="gather",
    )
