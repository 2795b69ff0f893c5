"""Quantized products as integer arithmetic: ConvInteger, MatMulInteger, QLinearConv, QLinearMatMul, QGemm.

8-bit operands go into the product as they are, with int32 sums, so that dot-product instructions can be used; zero
points z enter afterwards, by sum((a - za)(b - zb)) = sum(ab) - za sum(b) - zb sum(a) + n za zb.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant_value, static_shape


def _is_zero(value: Any) -> bool:
    """Whether a zero point is left out or known to be 0."""
    if value is None:
        return True
    known = constant_value(value)
    return known is not None and not known.any()


def _int32(value: Any) -> Any:
    from tvm import relax

    return relax.op.astype(value, "int32")


def integer_matmul(node: OpNode, a: Any, a_zero: Any, b: Any, b_zero: Any) -> Any:
    """int32 product (..., m, n) of 8-bit a (..., m, k) and b (..., k, n), minus their zero points.

    Zero points: scalars, or per row of a and per column of b: 1-d, or with a's and b's axes.
    """
    from tvm import relax

    op = relax.op
    total = node.emit(op.matmul(a, b, out_dtype="int32"))
    za, zb = _broadcastable(node, a, a_zero, -1), _broadcastable(node, b, b_zero, -2)
    if not _is_zero(a_zero):
        total = node.emit(op.subtract(total, op.multiply(za, op.sum(_int32(b), [-2], keepdims=True))))
    if not _is_zero(b_zero):
        total = node.emit(op.subtract(total, op.multiply(zb, op.sum(_int32(a), [-1], keepdims=True))))
    if not _is_zero(a_zero) and not _is_zero(b_zero):
        length = relax.const(static_shape(a, "the first factor")[-1], "int32")
        total = node.emit(op.add(total, op.multiply(op.multiply(za, zb), length)))
    return total


def _broadcastable(node: OpNode, value: Any, parameter: Any, axis: int, dtype: str = "int32") -> Any:
    """A scale or zero point as ``dtype``, a 1-d one put along the axis of ``value`` that ``axis`` isn't summed over."""
    from tvm import relax

    if parameter is None:
        return None
    shape = static_shape(parameter, "a zero point or scale")
    parameter = relax.op.astype(parameter, dtype)
    if shape == (1,):
        parameter = relax.op.reshape(parameter, ())
    elif len(shape) == 1 and axis == -1 and value.ty.ndim > 1:
        # Per row of the first factor.
        parameter = relax.op.expand_dims(parameter, 1)
    return node.emit(parameter)


def integer_conv(node: OpNode, operands: tuple[Any, Any, Any, Any]) -> Any:
    """int32 convolution of (x, w, x zero point, w zero point); x (n, c, spatial...), w (o, c / groups, kernel...)."""
    from tvm import relax

    op = relax.op
    x, w, x_zero, w_zero = operands
    rank = w.ty.ndim - 2
    if rank not in (1, 2, 3):
        raise Unsupported(f"{rank} spatial axes")
    shape = static_shape(w, "the weights")
    strides, dilation = (list(node.attrs.get(k, [1] * rank)) for k in ("strides", "dilations"))
    x = _padded(node, x, x_zero, _pads(node, x, shape[2:], strides, dilation))
    function = (op.nn.conv1d, op.nn.conv2d, op.nn.conv3d)[rank - 1]
    groups = node.integer("group", 1)

    def conv(data: Any, weights: Any) -> Any:
        return node.emit(function(data, weights, strides=strides, dilation=dilation, groups=groups, out_dtype="int32"))

    total = conv(x, w)
    tail = [1] * rank
    if not _is_zero(x_zero):
        sums = op.reshape(op.sum(_int32(w), list(range(1, rank + 2))), (1, shape[0], *tail))
        total = node.emit(op.subtract(total, op.multiply(_scalar(node, x_zero), sums)))
    if not _is_zero(w_zero):
        # The sums of the windows of x: a convolution with ones.
        ones = node.emit(op.ones(shape, "int8"))
        zeros = op.reshape(node.emit(_int32(w_zero)), (1, -1, *tail))
        if not _is_zero(x_zero):
            count = relax.const(shape[1] * _product(shape[2:]), "int32")
            windows = op.subtract(conv(x, ones), op.multiply(_scalar(node, x_zero), count))
        else:
            windows = conv(x, ones)
        total = node.emit(op.subtract(total, op.multiply(zeros, windows)))
    return total


def _product(values: tuple[int, ...]) -> int:
    import math

    return math.prod(values)


def _scalar(node: OpNode, value: Any) -> Any:
    from tvm import relax

    return node.emit(relax.op.reshape(_int32(value), ()))


def _pads(node: OpNode, x: Any, kernel: tuple[int, ...], strides: list[int], dilation: list[int]) -> list[int]:
    """Begins, then ends, as in ONNX's attribute."""
    mode = node.text("auto_pad", "NOTSET")
    rank = len(kernel)
    if mode == "NOTSET":
        return [int(p) for p in node.attrs.get("pads", [0] * (2 * rank))]
    if mode == "VALID":
        return [0] * (2 * rank)
    begins, ends = [], []
    for size, k, s, d in zip(static_shape(x, "the data")[2:], kernel, strides, dilation, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small = total // 2
        begins.append(total - small if mode == "SAME_LOWER" else small)
        ends.append(small if mode == "SAME_LOWER" else total - small)
    return begins + ends


def _padded(node: OpNode, x: Any, zero: Any, pads: list[int]) -> Any:
    """``x`` with its spatial axes padded with the value that stands for zero."""
    from tvm import relax, te, tirx

    if not any(pads):
        return x
    rank = len(pads) // 2
    if zero is None:
        zero = relax.const(0, str(x.ty.dtype.dtype))
    zero = node.emit(relax.op.reshape(zero, ()))

    def pad(data: Any, value: Any) -> Any:
        sizes = [n if i < 2 else n + pads[i - 2] + pads[i - 2 + rank] for i, n in enumerate(data.shape)]

        def at(*index: Any) -> Any:
            inner = [*index[:2], *(i - p for i, p in zip(index[2:], pads[:rank], strict=True))]
            inside = [tirx.all(i >= 0, i < n) for i, n in zip(inner[2:], data.shape[2:], strict=True)]
            return tirx.if_then_else(tirx.all(*inside), data(*inner), value())

        return te.compute(sizes, at, name="pad")

    return node.emit_te(pad, x, zero, name="pad_with_zero_point")


def requantized(node: OpNode, total: Any, scale: Any, zero: Any) -> Any:
    """``total`` (int32) times ``scale`` (float32), rounded half to even, plus ``zero``, saturated to its type."""
    from tvm import relax

    op = relax.op
    dtype = str(zero.ty.dtype.dtype)
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[dtype]
    scaled = op.round(op.multiply(op.astype(total, "float32"), scale))
    shifted = op.add(scaled, op.reshape(op.astype(zero, "float32"), ()))
    return node.emit(op.astype(op.clip(shifted, low, high), dtype))


def _zero_like(node: OpNode, index: int, dtype: str) -> Any:
    from tvm import relax

    return node.input(index) if node.has(index) else relax.const(0, dtype)


def _matmul_integer(node: OpNode) -> Any:
    return integer_matmul(node, node.input(0), node.input(2), node.input(1), node.input(3))


def _conv_integer(node: OpNode) -> Any:
    return integer_conv(node, (node.input(0), node.input(1), node.input(2), node.input(3)))


def _qlinear_conv(node: OpNode) -> Any:
    """Inputs x, its scale and zero point, w, its scale and zero point, y's scale and zero point, int32 bias."""
    from tvm import relax

    op = relax.op
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.inputs[:8]
    tail = [1] * (w.ty.ndim - 2)
    total = integer_conv(node, (x, w, x_zero, w_zero))
    if node.has(8):
        total = node.emit(op.add(total, op.reshape(node.input(8), (1, -1, *tail))))
    scale = op.divide(op.multiply(op.reshape(x_scale, ()), w_scale), op.reshape(y_scale, ()))
    return requantized(node, total, node.emit(op.reshape(node.emit(scale), (1, -1, *tail))), y_zero)


def _qlinear_matmul(node: OpNode) -> Any:
    """Inputs a, its scale and zero point, b, its scale and zero point, y's scale and zero point."""
    from tvm import relax

    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.inputs[:8]
    total = integer_matmul(node, a, a_zero, b, b_zero)
    factors = relax.op.multiply(
        _broadcastable(node, a, a_scale, -1, "float32"), _broadcastable(node, b, b_scale, -2, "float32")
    )
    scale = node.emit(relax.op.divide(factors, _broadcastable(node, a, y_scale, -1, "float32")))
    return requantized(node, total, scale, y_zero)


def _qgemm(node: OpNode) -> Any:
    """com.microsoft: A, its scale and zero point, B, its scale and zero point, int32 C, y's scale and zero point."""
    from tvm import relax

    op = relax.op
    a, a_scale, a_zero, b, b_scale, b_zero = node.inputs[:6]
    if node.integer("transA", 0):
        a = node.emit(op.permute_dims(a))
    if node.integer("transB", 0):
        b = node.emit(op.permute_dims(b))
    total = integer_matmul(node, a, a_zero, b, b_zero)
    if node.has(6):
        total = node.emit(op.add(total, node.input(6)))
    factors = op.multiply(op.reshape(a_scale, ()), _broadcastable(node, b, b_scale, -2, "float32"))
    factors = op.multiply(factors, relax.const(float(node.attrs.get("alpha", 1.0)), "float32"))
    if not node.has(7):
        return node.emit(op.multiply(op.astype(total, "float32"), factors))
    scale = node.emit(op.divide(factors, op.reshape(node.input(7), ())))
    return requantized(node, total, scale, _zero_like(node, 8, node.dtype(0)))


CONVERTERS: dict[str, Converter] = {
    "ConvInteger": _conv_integer,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "com.microsoft.QGemm": _qgemm,
}
