"""3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.

Each 6x6 tile of the input becomes 36 transformed values, B^T d B; products over channels for each of the 36
points; and the inverse A^T m A gives a 4x4 tile of the output.  The filters are transformed at compile time,
G g G^T in float64.  Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, section 4.1
and equations for F(4x4, 3x3).

Three loop nests: the input transform (``winograd_input``), 36 products of matrices (``winograd_product``) and the
output transform (``winograd_output``), behind which element-wise work is fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np

    from toolchain.tvm.machine import Machine

OUT = 4
"""Output values of a tile along an axis."""
POINTS = OUT + 2
"""Input values of a tile along an axis, and transformed values."""

_WORTH = 0.85
"""Largest estimated share of the direct convolution's time at which the detour is taken."""
_BYTES_PER_CYCLE = 8
"""Assumed bandwidth for filters and transformed values, which do not stay in level 1: between level 2 and memory."""


def possible(conv: Conv2d, shape: Sequence[int], out: tuple[Any, Any], lanes: int) -> bool:
    """Whether it applies: 3x3, stride 1, whole vectors of channels, an image of known size.

    Args:
        conv: sizes.
        shape: of the weights, (oc, ic, kh, kw).
        out: height and width of the output.
        lanes: elements of a vector.
    """
    oc, ic, kh, kw = shape
    plain = (kh, kw, conv.strides, conv.dilation, conv.groups) == (3, 3, (1, 1), (1, 1), 1)
    return plain and all(isinstance(size, int) for size in out) and ic % lanes == 0 and oc % lanes == 0


def pays(conv: Conv2d, shape: Sequence[int], out: tuple[Any, Any], machine: Machine) -> bool:
    """Whether the transforms and the larger filters cost less than the multiplications they save.

    Args:
        conv: sizes.
        shape: of the weights, (oc, ic, kh, kw).
        out: height and width of the output.
        machine: the target.
    """
    lanes = machine.lanes("float32")
    if not possible(conv, shape, out, lanes):
        return False
    oc, ic = shape[:2]
    height, width = out
    tiles = ceil_div(height, OUT) * ceil_div(width, OUT)
    direct = height * width * oc * ic * 9 / lanes
    product = tiles * POINTS**2 * oc * ic / lanes
    # Two passes of 1-d transforms of about four operations a value, and a load and a store of each.
    transforms = tiles * POINTS**2 * (ic + oc) / lanes * 12
    traffic = 4 * POINTS**2 * (oc * ic + 2 * tiles * (ic + oc)) / _BYTES_PER_CYCLE
    return bool(product + transforms + traffic < _WORTH * direct)


def pack_filters(weights: np.ndarray, lanes: int, vectors: int) -> np.ndarray:
    """(oc, ic, 3, 3) -> (36, tiles of output channels, ic, vectors, lanes), transformed."""
    import numpy as np

    matrix = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64) / np.array(
        [[24], [24], [24], [24], [24], [24]]
    )
    points = np.einsum("ar,oirs,bs->aboi", matrix, weights.astype(np.float64), matrix)
    oc, ic = weights.shape[:2]
    tiles = ceil_div(oc, vectors * lanes)
    padded = np.zeros((POINTS**2, tiles * vectors * lanes, ic), weights.dtype)
    padded[:, :oc] = points.reshape(POINTS**2, oc, ic)
    split = padded.reshape(POINTS**2, tiles, vectors, lanes, ic)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 2, 3))


def transform_input(data: Any, conv: Conv2d, out: tuple[int, int]) -> Any:
    """(n, ic/v, h, w, v) -> (36, n * tiles, ic)."""
    from tvm import te, tirx

    n, blocks, height, width, lanes = data.shape
    down, across = ceil_div(out[0], OUT), ceil_div(out[1], OUT)
    top, left = conv.padding[:2]
    tile = (n, down, across, blocks, POINTS, POINTS, lanes)

    def load(b: Any, ty: Any, tx: Any, c: Any, y: Any, x: Any, lane: Any) -> Any:
        row, column = ty * OUT + y - top, tx * OUT + x - left
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        return tirx.if_then_else(inside, data[b, c, row, column, lane], tirx.const(0, data.dtype))

    loaded = te.compute(tile, load, name="loaded")
    rows = te.compute(
        tile,
        lambda b, ty, tx, c, y, x, lane: _before(y, lambda k: loaded[b, ty, tx, c, k, x, lane]),
        name="rows",
    )
    both = te.compute(
        tile,
        lambda b, ty, tx, c, y, x, lane: _before(x, lambda k: rows[b, ty, tx, c, y, k, lane]),
        name="both",
        attrs={RULE: "winograd_input"},
    )
    per_image = down * across
    return te.compute(
        (POINTS * POINTS, n * per_image, blocks * lanes),
        lambda p, t, c: both[
            t // per_image,
            t % per_image // across,
            t % across,
            c // lanes,
            p // POINTS,
            p % POINTS,
            c % lanes,
        ],
        name="gather",
    )


def products(data: Any, filters: Any, channels: int, tile: Tile) -> Any:
    """(36, t, ic) x (36, tiles, ic, vectors, v) -> (36, oc/v, t, v)."""
    from tvm import te

    points, tiles, depth, vectors, lanes = (int(s) for s in filters.shape)
    t = data.shape[1]
    k = te.reduce_axis((0, depth), "k")
    covered = hasattr(t, "value") and int(t) % tile.rows == 0

    def product(p: Any, o: Any, outer: Any, inner: Any, lane: Any) -> Any:
        row = outer * tile.rows + inner
        row = row if covered else te.min(row, t - 1)
        return te.sum(data[p, row, k] * filters[p, o // vectors, k, o % vectors, lane], axis=k)

    marks = {RULE: "winograd_product", ROWS: 1, COLUMNS: tile.rows, VECTORS: vectors}
    shape = (points, tiles * vectors, (t - 1) // tile.rows + 1, tile.rows, lanes)
    acc = te.compute(shape, product, name="acc", attrs=marks)
    return te.compute(
        (points, channels, t, lanes),
        lambda p, o, i, lane: acc[p, o, i // tile.rows, i % tile.rows, lane],
        name="gather",
    )


def transform_output(data: Any, n: Any, out: tuple[int, int]) -> Any:
    """(36, oc/v, n * tiles, v) -> (n, oc/v, oh, ow, v)."""
    from tvm import te

    _, channels, _, lanes = data.shape
    down, across = ceil_div(out[0], OUT), ceil_div(out[1], OUT)

    def index(b: Any, ty: Any, tx: Any) -> Any:
        return (b * down + ty) * across + tx

    rows = te.compute(
        (n, channels, down, across, OUT, POINTS, lanes),
        lambda b, o, ty, tx, y, x, lane: _after(y, lambda k: data[k * POINTS + x, o, index(b, ty, tx), lane]),
        name="rows",
    )
    both = te.compute(
        (n, channels, down, across, OUT, OUT, lanes),
        lambda b, o, ty, tx, y, x, lane: _after(x, lambda k: rows[b, o, ty, tx, y, k, lane]),
        name="both",
        attrs={RULE: "winograd_output"},
    )
    return te.compute(
        (n, channels, *out, lanes),
        lambda b, o, y, x, lane: both[b, o, y // OUT, x // OUT, y % OUT, x % OUT, lane],
        name="gather",
    )


def _choose(index: Any, values: list[Any]) -> Any:
    """``values[index]``: the index is constant once its loop is unrolled, and the choice is made then."""
    from tvm import tirx

    chosen = values[-1]
    for number in reversed(range(len(values) - 1)):
        chosen = tirx.Select(index == number, values[number], chosen)
    return chosen


def _before(index: Any, d: Any) -> Any:
    """Row ``index`` of B^T times d(0..5)."""
    return _choose(
        index,
        [
            d(0) * 4.0 - d(2) * 5.0 + d(4),
            (d(3) + d(4)) - (d(1) + d(2)) * 4.0,
            (d(4) - d(3)) + (d(1) - d(2)) * 4.0,
            (d(4) - d(2)) + (d(3) - d(1)) * 2.0,
            (d(4) - d(2)) - (d(3) - d(1)) * 2.0,
            d(1) * 4.0 - d(3) * 5.0 + d(5),
        ],
    )


def _after(index: Any, m: Any) -> Any:
    """Row ``index`` of A^T times m(0..5)."""
    return _choose(
        index,
        [
            m(0) + (m(1) + m(2)) + (m(3) + m(4)),
            (m(1) - m(2)) + (m(3) - m(4)) * 2.0,
            (m(1) + m(2)) + (m(3) + m(4)) * 4.0,
            (m(1) - m(2)) + (m(3) - m(4)) * 8.0 + m(5),
        ],
    )
