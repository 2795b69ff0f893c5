"""Two-dimensional convolution of data in blocked layout, or of a plain image in the first layer.

Layouts: data (n, ic/b, h, w, b) or plain (n, ic, h, w); weights (tile of output channels, ic/b, kh, kw, b,
vectors, v); output (n, oc/v, oh, ow, v), v being the machine's vector width.  One value of the data is
multiplied with ``vectors`` vectors of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.tiles import Room, Tile, ceil_div, choose_rows, choose_tile

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Conv2d:
    """Sizes of a convolution: (top, left, bottom, right) padding; ``groups`` of equal size."""

    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def output(self, height: Any, width: Any, kernel: tuple[int, int]) -> tuple[Any, Any]:
        """Height and width of the output."""
        top, left, bottom, right = self.padding
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilation, strict=True)]
        return (
            (height + top + bottom - spans[0]) // self.strides[0] + 1,
            (width + left + right - spans[1]) // self.strides[1] + 1,
        )


def merge_groups(weights: np.ndarray, conv: Conv2d, lanes: int, most: int) -> tuple[np.ndarray, Conv2d] | None:
    """Weights (oc, ic/groups, kh, kw) and sizes with groups that are whole vectors of channels.

    As few neighbours as possible become one group, whose weights between one's outputs and another's inputs are zero:
    that multiplies with zeros, but at the full speed of vectors.  None where it would take more than ``most``.
    """
    import numpy as np

    oc, inputs, *kernel = weights.shape
    outputs = oc // conv.groups
    wanted = (n for n in range(1, most + 1) if conv.groups % n == 0)
    merged = next((n for n in wanted if n * inputs % lanes == 0 and n * outputs % lanes == 0), None)
    if merged is None or merged == 1:
        return (weights, conv) if merged else None
    groups = conv.groups // merged
    dense = np.zeros((groups, merged, outputs, merged, inputs, *kernel), weights.dtype)
    split = weights.reshape(groups, merged, outputs, inputs, *kernel)
    for member in range(merged):
        dense[:, member, :, member] = split[:, member]
    return dense.reshape(oc, merged * inputs, *kernel), replace(conv, groups=groups)


def pack_weights(weights: np.ndarray, lanes: int, block: int, vectors: int) -> np.ndarray:
    """(oc, ic, kh, kw) -> (tiles, ic/block, kh, kw, block, vectors, lanes); missing channels are zero."""
    import numpy as np

    oc, ic, kh, kw = weights.shape
    tiles, blocks = ceil_div(oc, vectors * lanes), ceil_div(ic, block)
    padded = np.zeros((tiles * vectors * lanes, blocks * block, kh, kw), weights.dtype)
    padded[:oc, :ic] = weights
    split = padded.reshape(tiles, vectors, lanes, blocks, block, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 3, 5, 6, 4, 1, 2))


def pack_depthwise(weights: np.ndarray, lanes: int) -> np.ndarray:
    """(c, 1, kh, kw) -> (c/lanes, kh, kw, lanes); missing channels are zero."""
    import numpy as np

    channels, _, kh, kw = weights.shape
    padded = np.zeros((ceil_div(channels, lanes) * lanes, kh, kw), weights.dtype)
    padded[:channels] = weights[:, 0]
    return np.ascontiguousarray(padded.reshape(-1, lanes, kh, kw).transpose(0, 2, 3, 1))


def choose_conv_tile(
    conv: Conv2d, out: tuple[Any, Any], vectors: int, room: Room, multiple: int = 1
) -> tuple[int, Tile]:
    """Image rows and tile, its columns a multiple of ``multiple``; ``vectors`` is of one group."""
    height, width = (size if isinstance(size, int) else None for size in out)
    if height is None or width is None:
        rows, tile = 1, choose_tile(None, vectors, room, multiple)
    else:
        rows, tile = choose_rows(height, width, vectors, room, multiple)
    if conv.groups > 1:
        tile = Tile(tile.rows, max(v for v in range(1, tile.vectors + 1) if vectors % v == 0))
    return rows, tile


def conv2d(data: Any, weights: Any, conv: Conv2d, channels: int, rows: int, tile: Tile) -> Any:
    """The loop nest.

    Args:
        data: tensor of the layout above; 4 axes: a plain image.
        weights: packed.
        conv: sizes.
        channels: blocks of output channels, ``oc / v`` rounded up.
        rows: image rows of a tile.
        tile: columns and vectors of a tile.
    """
    from tvm import te

    _, blocks, kh, kw, block, _, lanes = (int(s) for s in weights.shape)
    n, h, w = data.shape[0], data.shape[2], data.shape[3]
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, tile.rows)
    (stride_y, stride_x), (dilation_y, dilation_x) = conv.strides, conv.dilation
    plain = len(data.shape) == 4
    per_group = channels // conv.groups
    ic, ii = te.reduce_axis((0, blocks), "ic"), te.reduce_axis((0, block), "ii")
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    column_of = columns_of(padded, data, out_w, tile.rows)

    def read(b: Any, o: Any, y: Any, x: Any) -> Any:
        first = ic if conv.groups == 1 else o // per_group * blocks + ic
        row, column = y * stride_y + ky * dilation_y, x * stride_x + kx * dilation_x
        return padded[b, first, row, column] if plain else padded[b, first, row, column, ii]

    def product(b: Any, o: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        weight = weights[o // tile.vectors, ic, ky, kx, ii, o % tile.vectors, lane]
        return te.sum(read(b, o, y, column_of(outer, inner)) * weight, axis=[ic, ky, kx, ii])

    marks = {RULE: "conv", ROWS: rows, COLUMNS: tile.rows, VECTORS: tile.vectors}
    tiles = ceil_div(channels, tile.vectors) * tile.vectors
    return in_tiles(product, (n, tiles, out_h, out_w, lanes), channels, tile.rows, marks)


def depthwise2d(
    data: Any, weights: Any, conv: Conv2d, columns: int, fill: float | int = 0.0, sums: str | None = None
) -> Any:
    """One filter a channel: data (n, c/v, h, w, v), weights (c/v, kh, kw, v).

    Args:
        data: as above.
        weights: as above.
        conv: sizes.
        columns: of a tile.
        fill: the value of padding.
        sums: dtype of products and sums, if not that of the data.
    """
    from tvm import te

    blocks, kh, kw, lanes = (int(s) for s in weights.shape)
    n, h, w = data.shape[0], data.shape[2], data.shape[3]
    out_h, out_w = conv.output(h, w, (kh, kw))
    padded = padded_image(data, conv, (kh, kw), out_w, columns, fill)
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    column_of = columns_of(padded, data, out_w, columns)

    def product(b: Any, c: Any, y: Any, outer: Any, inner: Any, lane: Any) -> Any:
        x = column_of(outer, inner)
        row, column = y * conv.strides[0] + ky * conv.dilation[0], x * conv.strides[1] + kx * conv.dilation[1]
        value, weight = padded[b, c, row, column, lane], weights[c, ky, kx, lane]
        if sums is not None:
            value, weight = value.astype(sums), weight.astype(sums)
        return te.sum(value * weight, axis=[ky, kx])

    marks = {RULE: "depthwise", ROWS: 1, COLUMNS: columns, VECTORS: 1}
    return in_tiles(product, (n, blocks, out_h, out_w, lanes), blocks, columns, marks)


def columns_of(padded: Any, data: Any, out_w: Any, columns: int) -> Callable[[Any, Any], Any]:
    """From a tile and a place in it to a column; beyond the last, unless the padding has it, to the last again."""
    from tvm import te

    clamped = padded.same_as(data) and not (_static(out_w) and int(out_w) % columns == 0)

    def column_of(outer: Any, inner: Any) -> Any:
        x = outer * columns + inner
        return te.min(x, out_w - 1) if clamped else x

    return column_of


def in_tiles(
    product: Callable[..., Any], shape: tuple[Any, ...], channels: int, columns: int, marks: dict[str, Any]
) -> Any:
    """``product`` over whole tiles of columns, and behind it its values in blocked layout.

    Args:
        product: of (image, block of channels, row, tile, place in it, lane).
        shape: (n, blocks of channels computed, height, width, lanes).
        channels: blocks of channels kept.
        columns: of a tile.
        marks: annotations of the block that computes.
    """
    from tvm import te

    n, blocks, height, width, lanes = shape
    acc = te.compute((n, blocks, height, (width - 1) // columns + 1, columns, lanes), product, name="acc", attrs=marks)
    return te.compute(
        (n, channels, height, width, lanes),
        lambda b, o, y, x, lane: acc[b, o, y, x // columns, x % columns, lane],
        name="gather",
    )


def _static(size: Any) -> bool:
    return isinstance(size, int) or hasattr(size, "value")


def padded_image(
    data: Any, conv: Conv2d, kernel: tuple[int, int], out_w: Any, columns: int, fill: float | int = 0.0
) -> Any:
    """``data`` with its padding of ``fill``, and enough of it on the right that the last tile reads nothing else."""
    from tvm import topi

    if not any(conv.padding):
        return data
    top, left, bottom, right = conv.padding
    needed = (((out_w - 1) // columns + 1) * columns - 1) * conv.strides[1] + (kernel[1] - 1) * conv.dilation[1] + 1
    more = needed - (data.shape[3] + left + right)
    if not _static(more):
        return _filled(data, (top, left), data.shape[2] + top + bottom, needed, fill)
    extra = max(0, int(more))
    rest = [0] * (len(data.shape) - 4)
    return topi.nn.pad(data, [0, 0, top, left, *rest], [0, 0, bottom, right + extra, *rest], fill, name="pad")


def _filled(data: Any, corner: tuple[int, int], height: Any, width: Any, fill: float | int) -> Any:
    """``data`` at ``corner`` of an image of ``fill``; columns beyond ``width`` are left out.

    Just as wide as what is read, so that the analyzer can prove that all of it exists: not a maximum of that and the
    padded width.
    """
    from tvm import te, tirx

    (top, left), (rows, columns) = corner, data.shape[2:4]

    def value(b: Any, c: Any, y: Any, x: Any, *rest: Any) -> Any:
        inside = te.all(y >= top, y < rows + top, x >= left, x < columns + left)
        return tirx.if_then_else(inside, data[b, c, y - top, x - left, *rest], tirx.const(fill, data.dtype))

    return te.compute((*data.shape[:2], height, width, *data.shape[4:]), value, name="pad", tag="injective,pad")
