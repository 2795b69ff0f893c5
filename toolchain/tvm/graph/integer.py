"""Quantize/dequantize graphs as integer regions: what lies between two 8-bit values is computed on integers.

A product of dequantized data and dequantized constant weights becomes a product of their integers,

    sum((x - zx)(w - zw)) = sum(x w) - zx sum(w)          (weights have zw = 0)

with the second term and the bias folded into an int32 constant for each output channel; padding is filled with
zx, which stands for zero.  What follows (activation, quantization) is one chain of element-wise operators behind
it: value * scale, rounded half to even, plus the zero point, cut off at the limits and at the activation's bounds.
Pooling and changes of shape work on the integers themselves.  For whatever else reads a quantized value, there is
its real twin, a chain of element-wise operators made anew for each reader, so that it is fused there and never
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph import sums
from toolchain.tvm.graph.quantized import (
    LIMITS,
    Quantized,
    Sum,
    along,
    constant,
    dequantized,
    quantized,
    quantized_constant,
    real_sum,
    requantized,
)
from toolchain.tvm.graph.rewrite import Graph, graph_pass, is_straight
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of
from toolchain.tvm.library import Refusal, load_tvm

if TYPE_CHECKING:
    import numpy as np

_INT32 = 1 << 31


def integer_regions() -> Any:
    """The pass.

    Raises:
        Refusal: a product with quantized weights that would be computed in floating point.
    """
    tvm = load_tvm()
    return tvm.ir.transform.Sequential([graph_pass("integer_regions", _Integer), _refuse_left_over()])


def _refuse_left_over() -> Any:
    """Functions with control flow are not rewritten: one with 8-bit weights would multiply in floating point."""
    tvm = load_tvm()
    from tvm import relax

    def visit(expression: Any) -> None:
        if operator_of(expression) != "relax.dequantize" or dtype_of(expression.args[0]) not in LIMITS:
            return
        weights = constant_of(expression.args[0])
        if weights is not None and weights.ndim >= 2:
            raise Refusal("8-bit weights in a model with control flow are not multiplied as integers")

    @tvm.transform.module_pass(opt_level=0, name="toolchain.refuse_left_over")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        for _, function in module.functions_items():
            if isinstance(function, relax.Function) and not is_straight(function):
                relax.analysis.post_order_visit(function, visit)
        return module

    return apply


class _Integer:
    def __init__(self) -> None:
        self._quantized: dict[Any, Quantized] = {}
        self._sums: dict[Any, Sum] = {}
        self._rules: dict[str, Callable[[Graph, Any], Any]] = {
            "relax.dequantize": self._dequantize,
            "relax.quantize": self._quantize,
            "relax.nn.conv1d": self._convolution,
            "relax.nn.conv2d": self._convolution,
            "relax.nn.avg_pool2d": self._average_pool,
            "relax.matmul": self._matmul,
            "relax.add": self._add,
            "relax.nn.relu": lambda graph, call: self._bounded(call, 0.0, None),
            "relax.nn.relu6": lambda graph, call: self._bounded(call, 0.0, 6.0),
            "relax.clip": self._clip,
            "relax.maximum": lambda graph, call: self._bounded(call, _scalar(graph, call.args[1]), None),
            "relax.minimum": lambda graph, call: self._bounded(call, None, _scalar(graph, call.args[1])),
            "relax.mean": self._mean,
            "relax.concat": self._concat,
            **dict.fromkeys(_MOVES, self._moved),
        }

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        name = operator_of(value)
        rule = self._rules.get(name)
        made = rule(graph, value) if rule is not None else None
        if isinstance(made, Quantized):
            return self._remember(self._quantized, made, graph.emit(dequantized(graph, made)))
        if isinstance(made, Sum):
            return self._remember(self._sums, made, graph.emit(real_sum(graph, made)))
        if made is not None:
            return made
        if name in _PRODUCTS:
            self._check_product(graph, value)
        return self._read_anew(graph, value)

    def _remember(self, table: dict[Any, Any], made: Any, twin: Any) -> Any:
        table[twin] = made
        return twin

    def _read_anew(self, graph: Graph, value: Any) -> Any:
        """``value`` with chains of its own for the real values that it reads."""
        from tvm import relax

        if not isinstance(value, relax.Call):
            return value
        arguments = [graph.emit(dequantized(graph, self._quantized[a])) if self._is_value(a) else a for a in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)

    def _is_value(self, argument: Any) -> bool:
        from tvm import relax

        return isinstance(argument, relax.Var) and argument in self._quantized

    def _get(self, table: dict[Any, Any], argument: Any) -> Any:
        from tvm import relax

        return table.get(argument) if isinstance(argument, relax.Var) else None

    def _dequantize(self, graph: Graph, call: Any) -> Any:
        known = quantized_constant(call, graph)
        if known is None or str(call.attrs.out_dtype) != "float32":
            return None
        tensor, dtype = constant_of(graph.definition(call.args[0])), dtype_of(call.args[0])
        rank = len(shape_of(call.args[0]) or [])
        if dtype == "int32" and tensor is not None:
            scale, zero = (along(p, int(call.attrs.axis), rank) for p in known)
            return constant((tensor - zero) * scale, "float32")
        if dtype not in LIMITS or not rank:
            return None
        return Quantized(call.args[0], *known, int(call.attrs.axis) % rank)

    def _quantize(self, graph: Graph, call: Any) -> Any:
        known, dtype = quantized_constant(call, graph), str(call.attrs.out_dtype)
        if known is not None and dtype in LIMITS and known[0].size == known[1].size == 1:
            wanted_scale, wanted_zero = float(known[0].ravel()[0]), int(known[1].ravel()[0])
            total = self._get(self._sums, call.args[0])
            if total is not None:
                return requantized(graph, total, wanted_scale, wanted_zero, dtype)
            source = self._get(self._quantized, call.args[0])
            if source is not None and source.dtype == dtype and source.same_as(Quantized(source.value, *known)):
                return source.value
        if self._is_value(call.args[0]):
            call = self._read_anew(graph, call)
        return quantized(graph, call)

    def _weights(self, graph: Graph, argument: Any, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Integers and scales (1-d or a single one, along ``axis``) of constant s8 weights with zero points of 0."""
        import numpy as np

        source = self._get(self._quantized, argument)
        if source is None:
            return None
        weights = constant_of(graph.definition(source.value))
        if weights is None or (source.scale.size > 1 and source.axis != axis % weights.ndim):
            return None
        zeros = source.zero
        if source.dtype == "uint8" and (zeros == 128).all():
            weights, zeros = (weights.astype(np.int16) - 128).astype(np.int8), np.zeros_like(zeros)
        if str(weights.dtype) != "int8" or zeros.any():
            return None
        return weights, source.scale

    def _convolution(self, graph: Graph, call: Any) -> Sum | None:
        data, weights = self._get(self._quantized, call.args[0]), self._weights(graph, call.args[1], 0)
        if data is None or weights is None or not data.whole:
            return None
        return sums.convolution(graph, call, data, weights)

    def _matmul(self, graph: Graph, call: Any) -> Sum | None:
        data, weights = self._get(self._quantized, call.args[0]), self._weights(graph, call.args[1], -1)
        if data is None or weights is None or not data.whole or weights[0].ndim != 2:
            return None
        return sums.product(graph, data, weights)

    def _add(self, graph: Graph, call: Any) -> Sum | None:
        """A constant for each output channel joins the sum, as an integer if it is one."""
        import numpy as np

        for index in (0, 1):
            total: Sum | None = self._get(self._sums, call.args[index])
            bias = constant_of(graph.definition(call.args[1 - index]))
            if total is None or bias is None or total.bounded:
                continue
            bias = total.along(bias)
            if bias is None:
                continue
            with np.errstate(all="ignore"):
                steps = bias.astype(np.float64) / total.scale.astype(np.float64)
            whole = np.rint(steps)
            exact = np.isfinite(steps).all() and (abs(whole) < _INT32 // 2).all()
            if total.offset is None and exact and (abs(steps - whole) <= 1e-3 + 1e-6 * abs(whole)).all():
                return total.shifted(whole.astype(np.int64))
            offset = bias if total.offset is None else total.offset + bias
            return replace(total, offset=offset.astype(np.float32))
        return None

    def _clip(self, graph: Graph, call: Any) -> Sum | None:
        low, high = (getattr(argument, "value", None) for argument in call.args[1:3])
        return None if low is None or high is None else self._bounded(call, float(low), float(high))

    def _bounded(self, call: Any, low: float | None, high: float | None) -> Sum | None:
        total: Sum | None = self._get(self._sums, call.args[0])
        if total is None or (low is None and high is None):
            return None
        floor = total.low if low is None else max(total.low, low)
        ceiling = total.high if high is None else min(total.high, high)
        return replace(total, low=floor, high=ceiling)

    def _mean(self, graph: Graph, call: Any) -> Sum | None:
        data: Quantized | None = self._get(self._quantized, call.args[0])
        if data is None or not data.whole or call.attrs.axis is None:
            return None
        return sums.mean(graph, data, ints(call.attrs.axis), bool(call.attrs.keepdims))

    def _average_pool(self, graph: Graph, call: Any) -> Sum | None:
        data: Quantized | None = self._get(self._quantized, call.args[0])
        return None if data is None or not data.whole else sums.average_pool(graph, call, data)

    def _moved(self, graph: Graph, call: Any) -> Quantized | Sum | None:
        """Values that only change their places, or of which the largest is taken."""
        from tvm import relax

        total: Sum | None = self._get(self._sums, call.args[0])
        name = operator_of(call)
        if total is not None and name in _RESHAPES and total.uniform:
            moved = relax.Call(call.op, [total.value, *call.args[1:]], call.attrs, call.ty_args)
            return replace(total, value=graph.emit(moved))
        source = self._get(self._quantized, call.args[0])
        if source is None or not (source.whole or name == "relax.permute_dims"):
            return None
        weights = constant_of(graph.definition(source.value))
        if name == "relax.permute_dims" and weights is not None:
            axes = list(range(weights.ndim))[::-1] if call.attrs.axes is None else ints(call.attrs.axes)
            turned = constant(weights.transpose(axes), str(weights.dtype))
            return Quantized(turned, source.scale, source.zero, axes.index(source.axis))
        moved = relax.Call(call.op, [source.value, *call.args[1:]], call.attrs, call.ty_args)
        return source.with_value(graph.emit(moved)) if source.whole else None

    def _concat(self, graph: Graph, call: Any) -> Quantized | None:
        from tvm import relax

        if not isinstance(call.args[0], relax.Tuple):
            return None
        found: list[Quantized | None] = [self._get(self._quantized, part) for part in call.args[0].fields]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or not all(part.same_as(parts[0]) for part in parts):
            return None
        joined = relax.op.concat([part.value for part in parts], int(call.attrs.axis))
        return parts[0].with_value(graph.emit(joined))

    def _check_product(self, graph: Graph, call: Any) -> None:
        for argument in call.args[1:2]:
            source = self._get(self._quantized, argument)
            if source is not None and constant_of(graph.definition(source.value)) is not None:
                shape = " x ".join(str(size) for size in shape_of(argument) or [])
                raise Refusal(
                    f"{operator_of(call).removeprefix('relax.')} with 8-bit weights of {shape} can't be computed in "
                    "integers here: an engine that claims int8 and computes in fp32 is not offered"
                )


_MOVES = (
    "relax.reshape", "relax.permute_dims", "relax.nn.max_pool2d", "relax.nn.max_pool1d", "relax.flatten",
    "relax.nn.batch_flatten", "relax.squeeze", "relax.expand_dims", "relax.strided_slice", "relax.take",
    "relax.broadcast_to",
)  # fmt: skip
_RESHAPES = frozenset(_MOVES) & {
    "relax.reshape", "relax.flatten", "relax.nn.batch_flatten", "relax.squeeze", "relax.expand_dims",
}  # fmt: skip
_PRODUCTS = frozenset({
    "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d", "relax.matmul", "relax.nn.conv2d_transpose",
    "relax.nn.conv1d_transpose", "relax.nn.conv3d_transpose",
})  # fmt: skip


def _scalar(graph: Graph, value: Any) -> float | None:
    found = constant_of(graph.definition(value))
    return float(found.reshape(())) if found is not None and found.size == 1 else None
