"""Attention written as two products with a softmax between them becomes one loop nest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, same_shape, shape_of
from toolchain.tvm.loops import OPAQUE
from toolchain.tvm.loops.attention import Axes, Sizes, attention, plan
from toolchain.tvm.machine import Machine


def attention_kernels(machine: Machine) -> Any:
    """The pass."""
    return graph_pass("attention_kernels", lambda: _Attention(machine))


@dataclass(frozen=True, slots=True)
class View:
    """Queries, keys or values: the tensor that they lie in, and what its axes are."""

    source: Any
    axes: Axes


@dataclass(frozen=True, slots=True)
class _Scores:
    """What the softmax is taken of: a product times ``scale`` and, maybe, plus a mask."""

    product: Any
    scale: float
    mask: Any


class _Attention:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        name = operator_of(value)
        if name == "relax.permute_dims":
            return _cancelled(graph, value)
        if name != "relax.matmul" or dtype_of(value.args[0]) != "float32":
            return value
        softmax = graph.definition(value.args[0])
        if operator_of(softmax) != "relax.nn.softmax" or int(softmax.attrs.axis) not in (-1, 3):
            return value
        scores = _scores(graph, softmax.args[0])
        return value if scores is None else self._attention(graph, value, scores)

    def _attention(self, graph: Graph, call: Any, scores: _Scores) -> Any:
        from tvm import relax

        query, scale = _unscaled(graph, scores.product.args[0], scores.scale)
        keys, scale = _unscaled(graph, scores.product.args[1], scale)
        values = call.args[1]
        shapes = [shape_of(value) for value in (query, keys, values)]
        if any(shape is None or len(shape) != 4 for shape in shapes):
            return call
        (b, h, s, depth), key_shape, value_shape = (list(shape or ()) for shape in shapes)
        t = value_shape[2]
        if not isinstance(depth, int) or not same_shape(key_shape, [b, h, depth, t]):
            return call
        if not same_shape(value_shape, [b, h, t, depth]) or not _fits(scores.mask, [b, h, s, t]):
            return call
        views = [
            view(graph, operand, axes)
            for operand, axes in ((query, tuple("bhsd")), (keys, tuple("bhds")), (values, tuple("bhsd")))
        ]
        orders = (views[0].axes, views[1].axes, views[2].axes)
        made = plan(Sizes(b, h, s, t, depth), self._machine)
        masks = [] if scores.mask is None else [scores.mask]
        result = graph.emit(
            graph.builder.call_te(
                lambda *operands: attention(operands, orders, scale, made),
                *[view.source for view in views],
                *masks,
                primfunc_name_hint="attention",
                primfunc_attrs={"op_pattern": OPAQUE},
            )
        )
        return relax.op.permute_dims(result, [0, 2, 1, 3])


def _scores(graph: Graph, value: Any) -> _Scores | None:
    """``value`` as a scaled product with a mask, if it is one."""
    made, mask = graph.definition(value), None
    if operator_of(made) == "relax.add":
        for index in (0, 1):
            product, scale = _unscaled(graph, made.args[index], 1.0)
            if operator_of(graph.definition(product)) == "relax.matmul":
                return _Scores(graph.definition(product), scale, made.args[1 - index])
        return None
    product, scale = _unscaled(graph, value, 1.0)
    made = graph.definition(product)
    return _Scores(made, scale, mask) if operator_of(made) == "relax.matmul" else None


def _unscaled(graph: Graph, value: Any, scale: float) -> tuple[Any, float]:
    """``value`` without multiplications by constants, and ``scale`` times them."""
    while operator_of(made := graph.definition(value)) in ("relax.multiply", "relax.divide"):
        divides = operator_of(made) == "relax.divide"
        for index in (1,) if divides else (1, 0):
            constant = constant_of(graph.definition(made.args[index]))
            if constant is not None and constant.size == 1:
                value = made.args[1 - index]
                scale = scale / float(constant.reshape(())) if divides else scale * float(constant.reshape(()))
                break
        else:
            break
    return value, scale


def _fits(mask: Any, shape: list[Any]) -> bool:
    """Whether the mask broadcasts to the scores without widening them."""
    if mask is None:
        return True
    found = shape_of(mask)
    if found is None or len(found) > 4 or dtype_of(mask) != "float32":
        return False
    pairs = zip(found, shape[4 - len(found) :], strict=True)
    return all((isinstance(a, int) and a == 1) or same_shape([a], [b]) for a, b in pairs)


def view(graph: Graph, value: Any, axes: Axes) -> View:
    """``value``, whose axes are ``axes``, read where it lay before it was transposed or cut out of several."""
    while True:
        made, name = graph.definition(value), operator_of(graph.definition(value))
        if name == "relax.permute_dims" and made.attrs.axes is not None:
            before = dict(zip(ints(made.attrs.axes), axes, strict=True))
            value, axes = made.args[0], tuple(before[i] for i in range(len(axes)))
        elif name == "relax.take" and made.attrs.axis is not None:
            index, axis = constant_of(graph.definition(made.args[1])), int(made.attrs.axis)
            if index is None or index.ndim != 0 or axis < 0 or int(index) < 0:
                return View(value, axes)
            value, axes = made.args[0], (*axes[:axis], int(index), *axes[axis:])
        else:
            return View(value, axes)


def _cancelled(graph: Graph, call: Any) -> Any:
    """A transposition that another one undoes is none."""
    inner = graph.definition(call.args[0])
    if call.attrs.axes is None or operator_of(inner) != "relax.permute_dims" or inner.attrs.axes is None:
        return call
    outer, before = ints(call.attrs.axes), ints(inner.attrs.axes)
    return inner.args[0] if [before[axis] for axis in outer] == list(range(len(outer))) else call
