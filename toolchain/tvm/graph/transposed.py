"""Transposed convolution as a convolution of small kernels followed by a rearrangement of pixels.

With stride s, output pixel t (before cropping) gets x[i] w[k] from all i s + k = t.  With t = q s + r that is, for
each of the s phases r, an ordinary convolution with the kernel w[r], w[r + s], w[r + 2 s], ...: one convolution
with s x s times as many channels computes all phases, and no zeros are multiplied.  Source: Shi et al., "Is the
deconvolution layer the same as a convolutional layer?", 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.values import ints
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.tiles import ceil_div

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Phases:
    """What a transposed convolution becomes.

    Attributes:
        conv: the convolution of all phases.
        weights: (s_y * s_x * channels, ic, j_y, j_x); channels are ``oc`` filled up to whole vectors.
        strides: (s_y, s_x).
        begin: first row and column kept of the rearranged output.
        extra: rows and columns kept beyond what the input's size times the stride gives.
    """

    conv: Conv2d
    weights: np.ndarray
    strides: tuple[int, int]
    begin: tuple[int, int]
    extra: tuple[int, int]


def phases(attrs: Any, weights: np.ndarray, lanes: int) -> Phases | None:
    """The form above of a call with ``attrs`` and weights (ic, oc, kh, kw), or None if it has none."""
    import numpy as np

    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
    if layouts != ("NCHW", "IOHW", "NCHW") or int(attrs.groups) != 1 or set(ints(attrs.dilation)) != {1}:
        return None
    strides, output = ints(attrs.strides), ints(attrs.output_padding)
    top, left, bottom, right = ints(attrs.padding)
    ic, oc, *kernel = weights.shape
    taps = [ceil_div(k, s) for k, s in zip(kernel, strides, strict=True)]
    extra = [
        k - s - before - after + more
        for k, s, before, after, more in zip(kernel, strides, (top, left), (bottom, right), output, strict=True)
    ]
    # The rearranged output has (h + j - 1) s rows; those kept must be among them.
    if any(b + e > (j - 1) * s for b, e, j, s in zip((top, left), extra, taps, strides, strict=True)):
        return None
    channels = ceil_div(oc, lanes) * lanes
    split = np.zeros((strides[0], strides[1], channels, ic, taps[0], taps[1]), weights.dtype)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            place = taps[0] - 1 - y // strides[0], taps[1] - 1 - x // strides[1]
            split[y % strides[0], x % strides[1], :oc, :, place[0], place[1]] = weights[:, :, y, x].T
    rows, columns = taps[0] - 1, taps[1] - 1
    return Phases(
        Conv2d((1, 1), (rows, columns, rows, columns), (1, 1), 1),
        split.reshape(-1, ic, taps[0], taps[1]),
        (strides[0], strides[1]),
        (top, left),
        (extra[0], extra[1]),
    )
