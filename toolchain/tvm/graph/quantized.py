"""Quantized values and integer sums in a graph, and how floats are made of them and they of floats.

ONNX defines  real = (q - zero) * scale  and  q = saturate(round_half_even(real / scale) + zero).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import constant_of, dtype_of, shape_of

if TYPE_CHECKING:
    import numpy as np

LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
_ALL_LIMITS = {**LIMITS, "int16": (-32768, 32767), "uint16": (0, 65535)}

_ROUND = float(3 << 22)
"""1.5 * 2**23: adding it to a smaller float32 leaves no fraction, rounded half to even; subtracting it is exact.

Larger values stay beyond every limit, where they are cut off anyway.
"""


@dataclass(frozen=True, slots=True)
class Quantized:
    """8-bit values with one scale, or one along ``axis`` (constants only).

    Attributes:
        value: the int8 or uint8 tensor.
        scale: float32, () or 1-d.
        zero: int32, () or 1-d.
        axis: what a 1-d scale goes along.
    """

    value: Any
    scale: np.ndarray
    zero: np.ndarray
    axis: int = 0

    @property
    def dtype(self) -> str:
        return dtype_of(self.value)

    @property
    def whole(self) -> bool:
        """Whether one scale and zero point hold for all values."""
        return self.scale.size == 1 and self.zero.size == 1

    def with_value(self, value: Any) -> Quantized:
        return Quantized(value, self.scale, self.zero, self.axis)

    def same_as(self, other: Quantized) -> bool:
        """Whether equal numbers mean equal values."""
        return (
            self.whole
            and other.whole
            and self.dtype == other.dtype
            and float(self.scale.ravel()[0]) == float(other.scale.ravel()[0])
            and int(self.zero.ravel()[0]) == int(other.zero.ravel()[0])
        )


@dataclass(frozen=True, slots=True)
class Sum:
    """int32 sums of products: real = clip((value + shift) * scale + offset, low, high).

    Attributes:
        value: the int32 tensor.
        scale: float32, broadcast against ``value``.
        shift: integers, broadcast against ``value``; None for none.
        offset: float32, broadcast against ``value``; None for none.
        low, high: bounds.
        axis: that of the output channels.
        line: whether the second last axis, of size 1, is to be removed from what is made of it.
    """

    value: Any
    scale: np.ndarray
    shift: np.ndarray | None = None
    offset: np.ndarray | None = None
    low: float = float("-inf")
    high: float = float("inf")
    axis: int = -1
    line: bool = False

    @property
    def bounded(self) -> bool:
        return self.low > float("-inf") or self.high < float("inf")

    @property
    def uniform(self) -> bool:
        """Whether all its parameters hold for all values."""
        shifts = self.shift is None or self.shift.size == 1
        return self.scale.size == 1 and self.offset is None and shifts and not self.line

    def along(self, added: np.ndarray) -> np.ndarray | None:
        """``added`` shaped to broadcast against ``value``, or None if it isn't one value, or one for each channel."""
        target = shape_of(self.value) or []
        axis = self.axis % len(target)
        if added.size == 1:
            return added.reshape(())
        wanted = [target[axis] if i == axis else 1 for i in range(len(target))]
        shape = [1] * (len(target) - self.line - added.ndim) + list(added.shape)
        return added.reshape(wanted) if shape == wanted[: len(wanted) - self.line] or shape == wanted else None

    def finished(self, graph: Graph, result: Any) -> Any:
        """What was made of ``value``, element by element, in the shape of the operator's output."""
        from tvm import relax

        return relax.op.squeeze(graph.emit(result), [-2]) if self.line else result

    def shifted(self, by: np.ndarray) -> Sum:
        """This sum plus integers."""
        return replace(self, shift=by if self.shift is None else self.shift + by)

    def total(self, graph: Graph) -> Any:
        """The shifted sum as float32."""
        from tvm import relax

        value = self.value
        if self.shift is not None and self.shift.any():
            value = graph.emit(relax.op.add(value, constant(self.shift, "int32")))
        return graph.emit(relax.op.astype(value, "float32"))


def quantized_constant(call: Any, graph: Graph) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a quantize or dequantize call, or None if they aren't constant."""
    import numpy as np

    scale, zero = (constant_of(graph.definition(argument)) for argument in call.args[1:3])
    if scale is None or zero is None or str(scale.dtype) != "float32":
        return None
    return np.asarray(scale), np.asarray(zero).astype(np.int32)


def along(parameter: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A 1-d parameter shaped to broadcast along ``axis`` of ``rank`` axes; a single one becomes a scalar."""
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * rank
    shape[axis % rank] = parameter.size
    return parameter.reshape(shape)


def constant(value: np.ndarray, dtype: str) -> Any:
    """A Relax constant."""
    import numpy as np
    from tvm import relax

    return relax.const(np.array(value, dtype, order="C"), dtype)


def dequantized(graph: Graph, source: Quantized) -> Any:
    """The real values: a new chain of element-wise operators, to be fused with its reader."""
    from tvm import relax

    rank = len(shape_of(source.value) or [])
    real = graph.emit(relax.op.astype(source.value, "float32"))
    zero, scale = along(source.zero, source.axis, rank), along(source.scale, source.axis, rank)
    if source.zero.any():
        real = graph.emit(relax.op.subtract(real, constant(zero, "float32")))
    return relax.op.multiply(real, constant(scale, "float32"))


def real_sum(graph: Graph, source: Sum) -> Any:
    """The real values of a sum."""
    from tvm import relax

    op = relax.op
    real = op.multiply(source.total(graph), constant(source.scale, "float32"))
    if source.offset is not None:
        real = op.add(graph.emit(real), constant(source.offset, "float32"))
    if source.low > float("-inf"):
        real = op.maximum(graph.emit(real), relax.const(source.low, "float32"))
    if source.high < float("inf"):
        real = op.minimum(graph.emit(real), relax.const(source.high, "float32"))
    return source.finished(graph, real)


def requantized(graph: Graph, source: Sum, scale: float, zero: int, dtype: str) -> Any:
    """A sum as 8-bit values of ``scale`` and ``zero``: its bounds become those of the integers."""
    import numpy as np
    from tvm import relax

    op = relax.op
    factor = (source.scale.astype(np.float64) / scale).astype(np.float32)
    scaled = graph.emit(op.multiply(source.total(graph), constant(factor, "float32")))
    if source.offset is not None:
        offset = (source.offset.astype(np.float64) / scale).astype(np.float32)
        scaled = graph.emit(op.add(scaled, constant(offset, "float32")))
    low, high = LIMITS[dtype]
    if source.low > float("-inf"):
        low = min(high, max(low, int(np.rint(np.float32(source.low / scale))) + zero))
    if source.high < float("inf"):
        high = max(low, min(high, int(np.rint(np.float32(source.high / scale))) + zero))
    shift = relax.const(float(zero) - _ROUND, "float32")
    return source.finished(graph, saturated(graph, scaled, shift, (low, high), dtype))


def saturated(graph: Graph, scaled: Any, shift: Any, limits: tuple[int, int], dtype: str) -> Any:
    """``scaled`` rounded half to even, plus the zero point (``shift`` is it minus the rounding constant), cut off."""
    from tvm import relax

    op = relax.op
    rounded = graph.emit(op.add(scaled, relax.const(_ROUND, "float32")))
    shifted = graph.emit(op.add(rounded, shift))
    low = graph.emit(op.maximum(shifted, relax.const(float(limits[0]), "float32")))
    return op.astype(graph.emit(op.minimum(low, relax.const(float(limits[1]), "float32"))), dtype)


def quantized(graph: Graph, call: Any) -> Any:
    """A ``relax.quantize`` of real values as element-wise operators, or None if its form is unknown."""
    import numpy as np
    from tvm import relax

    op, dtype = relax.op, str(call.attrs.out_dtype)
    rank = len(shape_of(call.args[0]) or [])
    if dtype not in _ALL_LIMITS or dtype_of(call.args[0]) != "float32" or not rank:
        return None
    known = quantized_constant(call, graph)
    if known is not None:
        scale, zero = (along(p, int(call.attrs.axis), rank) for p in known)
        factor = constant(np.float32(1) / scale.astype(np.float32), "float32")
        scaled = graph.emit(op.multiply(call.args[0], factor))
        return saturated(graph, scaled, constant(zero - np.float32(_ROUND), "float32"), _ALL_LIMITS[dtype], dtype)
    if any(_elements(argument) != 1 for argument in call.args[1:3]):
        return None
    # Found at run time: dynamic quantization, one scale for all.
    single_scale = graph.emit(op.reshape(call.args[1], relax.ShapeExpr([])))
    zero_point = graph.emit(op.reshape(op.astype(call.args[2], "float32"), relax.ShapeExpr([])))
    shift = graph.emit(op.subtract(zero_point, relax.const(_ROUND, "float32")))
    scaled = graph.emit(op.divide(call.args[0], single_scale))
    return saturated(graph, scaled, shift, _ALL_LIMITS[dtype], dtype)


def _elements(value: Any) -> int:
    total = 1
    for size in shape_of(value) or []:
        total *= size if isinstance(size, int) else 0
    return total
