"""Convolutions of lines, (n, c, w), as convolutions of images of one row, for which there are loop nests."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of


def lines_as_images() -> Any:
    """The pass."""
    return graph_pass("lines_as_images", _Lines)


class _Lines:
    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        from tvm import relax

        if operator_of(value) != "relax.nn.conv1d":
            return value
        attrs, weights = value.attrs, constant_of(graph.definition(value.args[1]))
        shape = shape_of(value.args[0])
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
        if layouts != ("NCW", "OIW", "NCW") or weights is None or shape is None:
            return value
        if dtype_of(value.args[0]) not in ("float32", "float16"):
            return value
        left, right = ints(attrs.padding)
        n, c, w = shape
        image = graph.emit(relax.op.reshape(value.args[0], relax.ShapeExpr([n, c, 1, w])))
        filters = relax.const(weights[:, :, None, :], str(weights.dtype))
        made = relax.op.nn.conv2d(
            image,
            filters,
            strides=(1, ints(attrs.strides)[0]),
            padding=(0, left, 0, right),
            dilation=(1, ints(attrs.dilation)[0]),
            groups=int(attrs.groups),
        )
        return relax.op.reshape(graph.emit(made), relax.ShapeExpr(shape_of(graph.builder.normalize(value))))
