"""Moves reshapes behind element-wise work, so that it can be fused with the product that makes its input.

A linear layer on a sequence is a product of rows between two reshapes; bias, activation, residual addition and
normalization follow in the shape of the sequence.  They mean the same on rows: ``f(reshape(x))`` becomes
``reshape(f(x))``, reshapes meet and cancel, and only those before attention's heads and the outputs remain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.blocked import ANY_BINARY, ANY_UNARY
from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, ints, operator_of, same_shape, shape_of

if TYPE_CHECKING:
    import numpy as np


def sink_reshapes() -> Any:
    """The pass."""
    return graph_pass("sink_reshapes", _Sink)


class _Sink:
    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        name = operator_of(value)
        if name == "relax.reshape":
            return self._merged(graph, value)
        if name in ANY_UNARY:
            return self._moved(graph, value, 0, {})
        if name in ANY_BINARY:
            return self._binary(graph, value)
        if name in ("relax.nn.layer_norm", "relax.nn.rms_norm") and _over_last(value.attrs.axes, value):
            return self._moved(graph, value, 0, {}, keeps_last=True)
        if name == "relax.nn.softmax" and _over_last([value.attrs.axis], value):
            return self._moved(graph, value, 0, {}, keeps_last=True)
        return value

    def _merged(self, graph: Graph, value: Any) -> Any:
        """A reshape of a reshape is one; one that changes nothing is none."""
        source = value.args[0]
        inner = graph.definition(source)
        if operator_of(inner) == "relax.reshape":
            source = inner.args[0]
        before, after = shape_of(source), shape_of(graph.builder.normalize(value))
        if before is not None and after is not None and same_shape(before, after):
            return source
        return _reshape(source, after) if after is not None else value

    def _moved(
        self, graph: Graph, value: Any, index: int, replaced: dict[int, Any], *, keeps_last: bool = False
    ) -> Any:
        """``value`` computed before the reshape that makes its operand ``index``."""
        source = self._source(graph, value.args[index])
        target = shape_of(graph.builder.normalize(value))
        if source is None or target is None or not same_shape(shape_of(value.args[index]) or [], target):
            return value
        shape = shape_of(source)
        if keeps_last and (shape is None or not same_shape(shape[-1:], target[-1:])):
            return value
        from tvm import relax

        operands = [replaced.get(i, a) for i, a in enumerate(value.args)]
        operands[index] = source
        moved = graph.emit(relax.Call(value.op, operands, value.attrs, value.ty_args))
        return _reshape(moved, target)

    def _binary(self, graph: Graph, value: Any) -> Any:
        for index in (0, 1):
            source = self._source(graph, value.args[index])
            if source is None:
                continue
            other = self._operand(graph, value.args[1 - index], value.args[index], source)
            if other is not None:
                return self._moved(graph, value, index, {1 - index: other})
        return value

    def _source(self, graph: Graph, value: Any) -> Any:
        """What ``value`` is a reshape of, if it has fewer axes: rows."""
        made = graph.definition(value)
        if operator_of(made) != "relax.reshape":
            return None
        before, after = shape_of(made.args[0]), shape_of(value)
        return made.args[0] if before is not None and after is not None and len(before) < len(after) else None

    def _operand(self, graph: Graph, other: Any, lead: Any, source: Any) -> Any:
        """The other operand in the shape of the rows, or None."""
        constant = constant_of(graph.definition(other))
        rows, target, shape = shape_of(source), shape_of(lead), shape_of(other)
        if rows is None or target is None or shape is None:
            return None
        if constant is not None:
            return _row_constant(constant, rows, target)
        if not same_shape(shape, target):
            return None
        made = graph.definition(other)
        if operator_of(made) == "relax.reshape" and same_shape(shape_of(made.args[0]) or [], rows):
            return made.args[0]
        return graph.emit(_reshape(other, rows))


def _row_constant(constant: np.ndarray, rows: list[Any], target: list[Any]) -> Any:
    """A scalar, or one value for each element of the last axis, which both shapes must share; else None."""
    from tvm import relax

    if constant.size == 1:
        return relax.const(constant.reshape(()), str(constant.dtype))
    last = rows[-1:]
    if constant.shape[-1] == constant.size and same_shape(last, target[-1:]) and last == [constant.size]:
        return relax.const(constant.reshape(-1), str(constant.dtype))
    return None


def _reshape(value: Any, shape: list[Any]) -> Any:
    from tvm import relax

    return relax.op.reshape(value, relax.ShapeExpr(shape))


def _over_last(axes: Any, value: Any) -> bool:
    rank = len(shape_of(value.args[0]) or [])
    return [axis % rank for axis in ints(axes)] == [rank - 1] if rank else False
