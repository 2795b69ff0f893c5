"""Softmax, normalization and reductions over the last axes become loop nests over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolchain.tvm.graph.blocked import ANY_BINARY, ANY_UNARY
from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import dtype_of, ints, operator_of, shape_of
from toolchain.tvm.library import load_tvm
from toolchain.tvm.loops import OUT_FUSIBLE, REDUCTION
from toolchain.tvm.loops.rows import layer_norm, reduction, rms_norm, softmax
from toolchain.tvm.machine import Machine

_EXTREMA = {"reducemax": "max", "reducemin": "min"}

_REDUCED = 2
"""TVM's kind of an iteration variable that is reduced over."""

_REDUCTIONS = {"relax.sum": "sum", "relax.mean": "mean", "relax.max": "max", "relax.min": "min"}


def row_kernels(machine: Machine) -> Any:
    """The pass."""
    return graph_pass("row_kernels", lambda: _Rows(machine))


class _Rows:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        name = operator_of(value)
        if name == "relax.call_tir":
            return self._extremum(graph, value)
        if not name or not value.args or dtype_of(value.args[0]) not in ("float32", "float16"):
            return value
        shape = shape_of(value.args[0])
        if not shape:
            return value
        if name in ("relax.nn.softmax", "relax.nn.log_softmax"):
            if int(value.attrs.axis) % len(shape) != len(shape) - 1:
                return value
            log = name == "relax.nn.log_softmax"
            return self._rows(graph, value, 1, lambda x: softmax(x, self._lanes, log=log), [value.args[0]])
        if name in ("relax.nn.layer_norm", "relax.nn.rms_norm"):
            return self._normalized(graph, value, shape)
        if name in _REDUCTIONS:
            return self._reduced(graph, value, shape, _REDUCTIONS[name])
        return value

    @property
    def _lanes(self) -> int:
        """Rows are computed in float32 whatever they are stored in."""
        return self._machine.lanes("float32")

    def _normalized(self, graph: Graph, call: Any, shape: list[Any]) -> Any:
        last = _last(ints(call.attrs.axes), len(shape))
        if not last:
            return call
        epsilon, source = float(call.attrs.epsilon), call.args[0]
        if operator_of(call) == "relax.nn.rms_norm":
            operands = [source, _flat(graph, call.args[1])]
            return self._rows(graph, call, last, lambda x, g: rms_norm(x, g, self._lanes, epsilon), operands)
        used = [bool(call.attrs.scale), bool(call.attrs.center)]
        operands = [source, *(_flat(graph, a) for a, needed in zip(call.args[1:], used, strict=True) if needed)]

        def kernel(x: Any, *given: Any) -> Any:
            rest = iter(given)
            scale, center = (next(rest) if needed else None for needed in used)
            return layer_norm(x, scale, center, self._lanes, epsilon)

        return self._rows(graph, call, last, kernel, operands)

    def _reduced(self, graph: Graph, call: Any, shape: list[Any], how: str) -> Any:
        axes = list(range(len(shape))) if call.attrs.axis is None else ints(call.attrs.axis)
        last = _last(axes, len(shape))
        if not last:
            return call
        return self._rows(graph, call, last, lambda x: reduction(x, self._lanes, how, keep=False), [call.args[0]])

    def _extremum(self, graph: Graph, call: Any) -> Any:
        """The importer's loop nest for the largest or smallest of floats, if it reduces the last axes."""
        how = _EXTREMA.get(str(call.args[0].name_hint).rstrip("0123456789"))
        operands = list(call.args[1].fields) if how is not None else []
        if how is None or len(operands) != 1 or dtype_of(operands[0]) not in ("float32", "float16"):
            return call
        last = _last(_reduced_axes(graph.builder.get()[call.args[0]]), len(shape_of(operands[0]) or ()))
        if not last:
            return call
        return self._rows(graph, call, last, lambda x: reduction(x, self._lanes, how, keep=False), operands, how)

    def _rows(
        self, graph: Graph, call: Any, last: int, kernel: Callable[..., Any], operands: list[Any], name: str = ""
    ) -> Any:
        """``kernel`` on the first operand with its ``last`` axes as one, and at least one axis of rows before them."""
        source, result = operands[0], shape_of(graph.builder.normalize(call))
        shape = shape_of(source)
        if shape is None or result is None or any(size == 0 for size in shape):
            return call
        length: Any = 1
        for size in shape[-last:]:
            length = length * size
        flat = [*shape[:-last], length] if len(shape) > last else [1, length]
        if flat != shape:
            source = graph.emit(_reshape(source, flat))
        made = graph.emit(
            graph.builder.call_te(
                kernel,
                source,
                *operands[1:],
                primfunc_name_hint=name or operator_of(call).rsplit(".", 1)[-1],
                primfunc_attrs={"op_pattern": self._pattern(graph, source)},
            )
        )
        found = shape_of(made) or []
        return made if len(found) == len(result) and found == result else _reshape(made, result)

    def _pattern(self, graph: Graph, source: Any) -> int:
        """Fused with the element-wise work that makes its operand, unless that goes elsewhere: then with what follows.

        TVM's fusion knows no pattern that takes both.
        """
        made = graph.definition(source)
        elementwise = operator_of(made) in ANY_UNARY | ANY_BINARY
        return REDUCTION if elementwise and not _follows_product(graph, made) else OUT_FUSIBLE


def _reduced_axes(function: Any) -> list[int]:
    """Axes of the operand that a loop nest of a single reduction reduces."""
    from tvm import s_tir

    tvm = load_tvm()
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    body = schedule.get(block)
    taps = [variable.var for variable in body.iter_vars if int(variable.iter_type) == _REDUCED]
    (read,) = body.reads
    return [i for i, axis in enumerate(read.region) if any(axis.min.same_as(tap) for tap in taps)]


def _follows_product(graph: Graph, value: Any) -> bool:
    """Whether the chain of element-wise work that ends in ``value`` starts at a loop nest that it is fused into."""
    while operator_of(value) in ANY_UNARY | ANY_BINARY:
        value = graph.definition(value.args[0])
    return operator_of(value) in ("relax.call_tir", "relax.matmul")


def _last(axes: list[int], rank: int) -> int:
    """How many axes, if they are the last ones; else 0."""
    found = sorted(axis % rank for axis in axes)
    return len(found) if found == list(range(rank - len(found), rank)) else 0


def _flat(graph: Graph, value: Any) -> Any:
    shape = shape_of(value)
    if shape is None or len(shape) == 1:
        return value
    length: Any = 1
    for size in shape:
        length = length * size
    return graph.emit(_reshape(value, [length]))


def _reshape(value: Any, shape: list[Any]) -> Any:
    from tvm import relax

    return relax.op.reshape(value, relax.ShapeExpr(shape))
