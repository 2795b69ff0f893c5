"""Convolution with few output channels: the lanes of a vector are input channels, added up at the end.

A vector of output channels would be mostly empty where there are three of them, or one: the last layer of a network
that makes an image or a mask.  Here each output is ``kh kw ic / v`` multiply-adds of vectors and one sum over lanes.
Data (n, ic/v, h, w, v); weights (oc, ic/v, kh, kw, v); output plain, (n, oc, oh, ow).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import COLUMNS, RULE
from toolchain.tvm.loops.conv import Conv2d, columns_of, padded_image
from toolchain.tvm.tiles import MAX_ROWS, ceil_div

if TYPE_CHECKING:
    import numpy as np

_SUM = 8
"""What a sum over lanes costs, in multiply-adds of vectors: a halving for each bit, and its store."""

_WORTH = 1.2
"""How much less work it must be than with vectors of output channels."""


def pays(conv: Conv2d, weights: tuple[int, ...], lanes: int) -> bool:
    """Whether a convolution with weights (oc, ic, kh, kw) is less work this way."""
    oc, ic, kh, kw = weights
    taps, tall = kh * kw, ic * ceil_div(oc, lanes)
    wide = oc * (ceil_div(ic, lanes) * taps + _SUM)
    return conv.groups == 1 and oc * 4 <= lanes <= ic and _WORTH * wide < taps * tall


def columns_for(channels: int, registers: int) -> int:
    """Columns of a tile: its accumulators, the weights of each channel, and one vector of data are in registers."""
    return max(1, min(MAX_ROWS, (registers - 1 - channels) // channels))


def pack_weights(weights: np.ndarray, lanes: int) -> np.ndarray:
    """(oc, ic, kh, kw) -> (oc, ic/lanes, kh, kw, lanes); missing channels are zero."""
    import numpy as np

    oc, ic, kh, kw = weights.shape
    padded = np.zeros((oc, ceil_div(ic, lanes) * lanes, kh, kw), weights.dtype)
    padded[:, :ic] = weights
    return np.ascontiguousarray(padded.reshape(oc, -1, lanes, kh, kw).transpose(0, 1, 3, 4, 2))


def conv2d_few(data: Any, weights: Any, conv: Conv2d, columns: int) -> Any:
    """The loop nest; ``columns`` of a tile."""
    from tvm import te

    oc, blocks, kh, kw, lanes = (int(s) for s in weights.shape)
    out_h, out_w = conv.output(data.shape[2], data.shape[3], (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, columns)
    ic, ky, kx = (te.reduce_axis((0, size), name) for size, name in ((blocks, "ic"), (kh, "ky"), (kw, "kx")))
    column_of = columns_of(padded, data, out_w, columns)

    def product(b: Any, o: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        row = y * conv.strides[0] + ky * conv.dilation[0]
        column = column_of(outer, inner) * conv.strides[1] + kx * conv.dilation[1]
        return te.sum(padded[b, ic, row, column, lane] * weights[o, ic, ky, kx, lane], axis=[ic, ky, kx])

    tiles = (data.shape[0], oc, out_h, (out_w - 1) // columns + 1, columns)
    part = te.compute((*tiles, lanes), product, name="acc", attrs={RULE: "few", COLUMNS: columns})
    while lanes > 1:
        lanes //= 2
        part = _halved(part, (*tiles, lanes))
    summed = part
    return te.compute(
        (data.shape[0], oc, out_h, out_w),
        lambda b, o, y, x: summed[b, o, y, x // columns, x % columns, 0],
        name="gather",
    )


def _halved(part: Any, shape: tuple[Any, ...]) -> Any:
    from tvm import te

    half = shape[-1]
    return te.compute(shape, lambda *at: part[at] + part[(*at[:-1], at[-1] + half)], name=f"sum{half}")
