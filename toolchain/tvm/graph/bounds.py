"""Bounds by constants as operators with immediates, instead of loop nests that read a scalar from memory.

The importer turns ONNX's Clip into calls of ready-made loop nests named ``maximum`` and ``minimum``, which no
later phase understands: they are operators again afterwards.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, operator_of, same_shape, shape_of


def name_bounds() -> Any:
    """The pass."""
    return graph_pass("name_bounds", _Bounds)


class _Bounds:
    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        from tvm import relax

        if operator_of(value) != "relax.call_tir" or not isinstance(value.args[1], relax.Tuple):
            return value
        name = str(value.args[0].name_hint).rstrip("0123456789")
        operands = list(value.args[1].fields)
        if name not in ("maximum", "minimum") or len(operands) != 2:
            return value
        shape, result = shape_of(operands[0]), shape_of(graph.builder.normalize(value))
        bound = constant_of(graph.definition(operands[1]))
        if bound is None or bound.size != 1 or shape is None or result is None or not same_shape(shape, result):
            return value
        constant = relax.const(bound.reshape(()), str(bound.dtype))
        return (relax.op.maximum if name == "maximum" else relax.op.minimum)(operands[0], constant)
