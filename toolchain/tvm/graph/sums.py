"""Integer sums that quantized operators become: convolutions, matrix products, averages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.quantized import Quantized, Sum
from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import ints, operator_of, shape_of
from toolchain.tvm.loops.conv import Conv2d

if TYPE_CHECKING:
    import numpy as np

_MOST = 1 << 23
"""Values of 8 bits whose sum surely fits in int32."""


def convolution(graph: Graph, call: Any, data: Quantized, weights: tuple[np.ndarray, np.ndarray]) -> Sum | None:
    """``relax.nn.conv2d`` or ``conv1d`` of dequantized values; a line is an image of one row.

    Args:
        graph: the function being built.
        call: the convolution.
        data: one scale for all.
        weights: s8 (oc, ic / groups, kernel...) with zero points of 0, and their scales, one or one for each oc.
    """
    attrs = call.attrs
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
    strides, padding, dilation = ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation)
    if layouts == ("NCHW", "OIHW", "NCHW"):
        (top, left, bottom, right), image, filters = padding, data.value, weights[0]
        sizes = Conv2d((strides[0], strides[1]), (top, left, bottom, right), (dilation[0], dilation[1]), 1)
    elif layouts == ("NCW", "OIW", "NCW"):
        image, filters = _image_of(graph, data.value), weights[0][:, :, None]
        sizes = Conv2d((1, strides[0]), (0, padding[0], 0, padding[1]), (1, dilation[0]), 1)
    else:
        return None
    sizes = replace(sizes, groups=int(attrs.groups))
    found = _image_sum(graph, data.with_value(image), filters, weights[1], sizes)
    return replace(found, line=weights[0].ndim == 3)


def _image_of(graph: Graph, line: Any) -> Any:
    """(n, c, w) as (n, c, 1, w): the image that it was made of, if it was."""
    from tvm import relax

    made = graph.definition(line)
    if operator_of(made) == "relax.squeeze" and len(shape_of(made.args[0]) or []) == 4:
        return made.args[0]
    return graph.emit(relax.op.expand_dims(line, 2))


def _image_sum(graph: Graph, data: Quantized, filters: np.ndarray, scales: np.ndarray, sizes: Conv2d) -> Sum:
    from tvm import relax

    zero, padding, source = int(data.zero.ravel()[0]), list(sizes.padding), data.value
    if zero and any(padding):
        # Filled with what stands for zero.
        top, left, bottom, right = padding
        width = [0, 0, 0, 0, top, bottom, left, right]
        source = graph.emit(relax.op.nn.pad(source, width, "constant", float(zero)))
        padding = [0, 0, 0, 0]
    constant = relax.const(filters, "int8")
    product = relax.op.nn.conv2d(
        source, constant, list(sizes.strides), padding, list(sizes.dilation), sizes.groups, out_dtype="int32"
    )
    sums = filters.astype("int64").sum((1, 2, 3)).reshape(1, -1, 1, 1)
    scale = data.scale.reshape(()) * scales.reshape((1, -1, 1, 1) if scales.size > 1 else ())
    return Sum(graph.emit(product), scale, axis=1).shifted(-zero * sums)


def product(graph: Graph, data: Quantized, weights: tuple[np.ndarray, np.ndarray]) -> Sum:
    """A matrix product of dequantized values with s8 weights (k, n), zero points of 0, a scale or one a column."""
    from tvm import relax

    made = relax.op.matmul(data.value, relax.const(weights[0], "int8"), out_dtype="int32")
    sums = weights[0].astype("int64").sum(0)
    scale = data.scale.reshape(()) * weights[1].reshape((-1,) if weights[1].size > 1 else ())
    return Sum(graph.emit(made), scale).shifted(-int(data.zero.ravel()[0]) * sums)


def mean(graph: Graph, data: Quantized, axes: list[int], keepdims: bool) -> Sum | None:
    """The mean over ``axes`` of dequantized values, or None if their number is unknown or too large."""
    import numpy as np
    from tvm import relax

    shape = shape_of(data.value) or []
    sizes = [shape[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes) or (count := int(np.prod(sizes))) >= _MOST:
        return None
    wide = graph.emit(relax.op.astype(data.value, "int32"))
    total = graph.emit(relax.op.sum(wide, axes, keepdims))
    return _averaged(Sum(total, data.scale.reshape(())), data, count)


def average_pool(graph: Graph, call: Any, data: Quantized) -> Sum | None:
    """``relax.nn.avg_pool2d`` as a convolution with ones, one filter a channel; None for partly filled windows."""
    import numpy as np

    attrs, shape = call.attrs, shape_of(data.value) or []
    padding, dilation = ints(attrs.padding), ints(attrs.dilation)
    if str(attrs.layout) != "NCHW" or attrs.ceil_mode or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    if any(padding) and not attrs.count_include_pad:
        return None
    (height, width), strides = ints(attrs.pool_size), ints(attrs.strides)
    top, left, bottom, right = padding
    sizes = Conv2d((strides[0], strides[1]), (top, left, bottom, right), (dilation[0], dilation[1]), shape[1])
    ones = np.ones((shape[1], 1, height, width), np.int8)
    total = _image_sum(graph, data, ones, np.ones(1, np.float32), sizes)
    return replace(total, scale=(total.scale / np.float32(height * width)).astype(np.float32))


def _averaged(total: Sum, data: Quantized, count: int) -> Sum:
    import numpy as np

    averaged = replace(total, scale=(total.scale / np.float32(count)).astype(np.float32))
    return averaged.shifted(np.array(-int(data.zero.ravel()[0]) * count))
