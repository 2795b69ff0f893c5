"""Convolutions of volumes, (n, c, d, h, w), as convolutions of images, for which there are loop nests.

The slices that a kernel spans in depth become channels: an output slice is a convolution of an image with ``kd`` times
as many channels, and all slices together are a batch of such images.  Each value is copied ``kd`` times, and used for
``2 kh kw oc`` operations after that.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of


def volumes_as_images() -> Any:
    """The pass."""
    return graph_pass("volumes_as_images", _Volumes)


class _Volumes:
    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        from tvm import relax

        if operator_of(value) != "relax.nn.conv3d":
            return value
        attrs, weights = value.attrs, constant_of(graph.definition(value.args[1]))
        shape, out = shape_of(value.args[0]), shape_of(graph.builder.normalize(value))
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
        if layouts != ("NCDHW", "OIDHW", "NCDHW") or weights is None or shape is None or out is None:
            return value
        if dtype_of(value.args[0]) not in ("float32", "float16") or not isinstance(shape[2], int):
            return value
        front, top, left, back, bottom, right = ints(attrs.padding)
        strides, dilation = ints(attrs.strides), ints(attrs.dilation)
        images = _slices(graph, value.args[0], (front, back), strides[0], dilation[0], weights.shape[2], out[2])
        kernel = weights.reshape(weights.shape[0], -1, *weights.shape[3:])
        made = relax.op.nn.conv2d(
            images,
            relax.const(kernel, str(kernel.dtype)),
            strides=strides[1:],
            padding=(top, left, bottom, right),
            dilation=dilation[1:],
            groups=int(attrs.groups),
        )
        slices = relax.op.reshape(graph.emit(made), relax.ShapeExpr([out[0], out[2], out[1], *out[3:]]))
        return relax.op.permute_dims(graph.emit(slices), [0, 2, 1, 3, 4])


def _slices(
    graph: Graph, volume: Any, padding: tuple[int, int], stride: int, dilation: int, taps: int, depth: Any
) -> Any:
    """(n, c, d, h, w) to (n * depth, c * taps, h, w): what each output slice reads, channel by channel."""
    from tvm import relax

    n, c, _, h, w = shape_of(volume)  # type: ignore[misc]
    if any(padding):
        volume = graph.emit(relax.op.nn.pad(volume, [0, 0, 0, 0, *padding, 0, 0, 0, 0]))
    length = (int(depth) - 1) * stride + 1
    parts = []
    for tap in range(taps):
        first = tap * dilation
        part = graph.emit(relax.op.strided_slice(volume, [2], [first], [first + length], [stride]))
        parts.append(graph.emit(relax.op.reshape(part, relax.ShapeExpr([n, c, 1, depth, h, w]))))
    spans = graph.emit(relax.op.concat(parts, axis=2)) if taps > 1 else parts[0]
    ordered = graph.emit(relax.op.permute_dims(spans, [0, 3, 1, 2, 4, 5]))
    return graph.emit(relax.op.reshape(ordered, relax.ShapeExpr([n * depth, c * taps, h, w])))
