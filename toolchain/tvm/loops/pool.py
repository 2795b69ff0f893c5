"""Max pooling of images in blocked layout, all values of a window in registers."""

from __future__ import annotations

import itertools
from typing import Any

from toolchain.tvm.loops.conv import Conv2d

_MOST = 25
"""Most values of a window that are written out."""


def max_pool_fits(window: tuple[int, int], sizes: Conv2d, ceil_mode: bool) -> bool:
    """Whether :func:`max_pool2d` computes this pooling."""
    top, left, bottom, right = sizes.padding
    within = max(top, bottom) < window[0] and max(left, right) < window[1]
    return within and sizes.dilation == (1, 1) and not ceil_mode and window[0] * window[1] <= _MOST


def max_pool2d(data: Any, window: tuple[int, int], sizes: Conv2d) -> Any:
    """The loop nest: (n, c/v, h, w, v) -> (n, c/v, oh, ow, v).

    Beyond an edge the pixel at the edge is read again, which never changes the largest value: the padding is less
    than the window, so the window holds that pixel.
    """
    from tvm import te

    n, blocks, h, w, lanes = data.shape
    out_h, out_w = sizes.output(h, w, window)
    top, left, bottom, right = sizes.padding

    def inside(position: Any, before: int, after: int, size: Any) -> Any:
        position = te.max(position - before, 0) if before else position
        return te.min(position, size - 1) if after else position

    def largest(b: Any, c: Any, y: Any, x: Any, lane: Any) -> Any:
        found = None
        for ky, kx in itertools.product(range(window[0]), range(window[1])):
            row = inside(y * sizes.strides[0] + ky, top, bottom, h)
            column = inside(x * sizes.strides[1] + kx, left, right, w)
            value = data[b, c, row, column, lane]
            found = value if found is None else te.max(found, value)
        return found

    return te.compute((n, blocks, out_h, out_w, lanes), largest, name="max_pool")
