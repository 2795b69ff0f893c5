"""Element-wise operators whose forms TVM's importer lacks, ignores or computes inexactly."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant, constant_value


def number(node: OpNode, value: float, index: int = 0) -> Any:
    """A scalar constant of the element type of input ``index``."""
    from tvm import relax

    return relax.const(value, node.dtype(index))


def is_float(dtype: str) -> bool:
    """Whether the elements are floating-point numbers."""
    return dtype.startswith(("float", "bfloat"))


def _is_inf(node: OpNode) -> Any:
    from tvm import relax

    op, x = relax.op, node.input(0)
    negative, positive = node.integer("detect_negative", 1), node.integer("detect_positive", 1)
    if negative and positive:
        return node.default()
    if not negative and not positive:
        return op.zeros(node.shape(0), "bool")
    sign = op.less(x, number(node, 0)) if negative else op.greater(x, number(node, 0))
    return op.logical_and(op.isinf(x), sign)


def _bit_shift(node: OpNode) -> Any:
    """A shift by the width or more, or by less than nothing, gives 0 (or the sign); machines disagree."""
    from tvm import relax

    op, (x, shift) = relax.op, node.inputs[:2]
    dtype = node.dtype(0)
    bits = int("".join(c for c in dtype if c.isdigit()))
    left = node.text("direction") == "LEFT"
    last = number(node, bits - 1)
    inside = op.less_equal(shift, last)
    if not dtype.startswith("u"):
        inside = op.logical_and(inside, op.greater_equal(shift, number(node, 0)))
    bounded = node.emit(op.where(inside, shift, last))
    if left:
        return op.where(inside, op.left_shift(x, bounded), number(node, 0))
    # A signed value keeps shifting in its sign; an unsigned one is used up.
    beyond = number(node, 0) if dtype.startswith("u") else op.right_shift(x, last)
    return op.where(inside, op.right_shift(x, bounded), beyond)


def _mod(node: OpNode) -> Any:
    """With fmod the sign of the dividend, else that of the divisor, as numpy's fmod and mod."""
    from tvm import te, tirx, topi

    if not is_float(node.dtype(0)) or node.integer("fmod", 0):
        return node.default()

    def compute(a: Any, b: Any) -> Any:
        wide = "float32" if a.dtype == "float16" else str(a.dtype)
        a, b = topi.cast(a, wide), topi.cast(b, wide)
        rest = topi.mod(a, b)

        def at(r: Any, d: Any) -> Any:
            zero = tirx.const(0, wide)
            other_sign = tirx.any(tirx.all(r < zero, d > zero), tirx.all(r > zero, d < zero))
            return tirx.Select(other_sign, r + d, tirx.Select(r == zero, zero * d, r))

        shape = rest.shape
        divisor = topi.broadcast_to(b, shape)
        return topi.cast(te.compute(shape, lambda *i: at(rest(*i), divisor(*i))), node.dtype(0))

    return node.emit_te(compute, node.input(0), node.input(1), name="floor_mod")


def _constant_power(node: OpNode) -> Any:
    """A small whole power of float32 as multiplications: the C library's function takes ten times as long, a value."""
    from tvm import relax

    op, base, exponent = relax.op, node.input(0), constant_value(node.input(1))
    if node.dtype(0) != "float32" or exponent is None or exponent.size != 1 or exponent.ndim > node.rank(0):
        return None
    match float(exponent.reshape(())):
        case 1.0:
            return base
        case 2.0:
            return op.multiply(base, base)
        case 3.0:
            return op.multiply(node.emit(op.multiply(base, base)), base)
        case -1.0:
            return op.divide(number(node, 1), base)
    return None


def _pow(node: OpNode) -> Any:
    """The result has the base's type; integer powers of integers are exact as float64 up to 2**53."""
    from tvm import relax

    op, (base, exponent) = relax.op, node.inputs[:2]
    dtype, other = node.dtype(0), node.dtype(1)
    power = _constant_power(node)
    if power is not None:
        return power
    if dtype == other and is_float(dtype):
        return node.default()
    if is_float(dtype):
        return op.power(base, op.astype(exponent, dtype))
    wide = "float64" if dtype.endswith(("32", "64")) or other.endswith("64") else "float32"
    return op.astype(op.power(op.astype(base, wide), op.astype(exponent, wide)), dtype)


def _elu(node: OpNode) -> Any:
    from tvm import relax

    op, x = relax.op, node.input(0)
    alpha = number(node, float(node.attrs.get("alpha", 1.0)))
    negative = op.multiply(alpha, op.subtract(op.exp(op.minimum(x, number(node, 0))), number(node, 1)))
    return op.where(op.less(x, number(node, 0)), negative, x)


def _prelu(node: OpNode) -> Any:
    from tvm import relax

    op, (x, slope) = relax.op, node.inputs[:2]
    return op.where(op.less(x, number(node, 0)), op.multiply(x, slope), x)


def _bit_cast(node: OpNode) -> Any:
    from tvm import te, tirx

    dtype, target = node.dtype(0), onnx_dtype(node.integer("to", 0))
    if "bool" in (dtype, target):
        raise Unsupported("bool has no bits to reinterpret here")

    def compute(x: Any) -> Any:
        return te.compute(x.shape, lambda *i: tirx.reinterpret(target, x(*i)), name="bit_cast")

    return node.emit_te(compute, node.input(0), name="bit_cast")


def onnx_dtype(element_type: int) -> str:
    """The name of an ONNX element type, as numpy and TVM call it."""
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(element_type))


def _dropout(node: OpNode) -> Any:
    """In inference the input itself, and a mask of true."""
    from tvm import relax

    if node.has(2) and bool(node.constant(2, "training_mode").reshape(-1)[0]):
        ratio = float(node.constant(1, "ratio").reshape(-1)[0]) if node.has(1) else 0.5
        if ratio:
            raise Unsupported("training_mode: random")
    mask = relax.op.ones_like(node.input(0), "bool")
    return relax.Tuple([node.input(0), node.emit(mask)])


def _one_hot(node: OpNode) -> Any:
    """Indices outside [-depth, depth) give off values everywhere."""
    from tvm import relax

    op = relax.op
    depth = int(node.constant(1, "depth").reshape(-1)[0])
    rank = node.rank(0) + 1
    axis = node.axis("axis", -1, rank)
    # float indices are rounded towards zero
    indices = node.emit(op.astype(node.input(0), "int64"))
    wrapped = op.where(op.less(indices, relax.const(0, "int64")), op.add(indices, relax.const(depth, "int64")), indices)
    column = [1] * rank
    column[axis] = depth
    classes = op.reshape(op.arange(0, depth, 1, "int64"), column)
    hot = op.equal(op.expand_dims(wrapped, axis), classes)
    parts = node.emit(op.split(node.input(2), 2, 0))
    off, on = (node.emit(op.reshape(node.emit(parts[i]), ())) for i in range(2))
    return op.where(hot, on, off)


def _eye_like(node: OpNode) -> Any:
    import numpy as np

    dtype = onnx_dtype(node.integer("dtype", 0)) if "dtype" in node.attrs else node.dtype(0)
    rows, columns = node.shape(0)
    return constant(np.eye(rows, columns, node.integer("k", 0)).astype(dtype))


def _swish(node: OpNode) -> Any:
    from tvm import relax

    alpha = float(node.attrs.get("alpha", 1.0))
    x = node.input(0)
    inner = x if alpha == 1.0 else relax.op.multiply(x, number(node, alpha))
    return relax.op.multiply(x, relax.op.sigmoid(inner))


def _celu(node: OpNode) -> Any:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    from tvm import relax

    op, x, zero = relax.op, node.input(0), number(node, 0)
    alpha = float(node.attrs.get("alpha", 1.0))
    grown = op.exp(op.multiply(x, number(node, 1 / alpha)))
    negative = op.multiply(number(node, alpha), op.subtract(grown, number(node, 1)))
    return op.add(op.maximum(x, zero), op.minimum(negative, zero))


def _softplus_of(node: OpNode, x: Any) -> Any:
    """max(x, 0) + log(1 + e), e = exp(-|x|); for small e by its series, which 1 + e would round away."""
    from tvm import relax

    op = relax.op
    e = node.emit(op.exp(op.negative(op.abs(x))))
    one = number(node, 1)
    tail = op.subtract(one, op.multiply(e, op.subtract(number(node, 0.5), op.multiply(e, number(node, 1 / 3)))))
    log = op.where(op.less(e, number(node, 2.0**-7)), op.multiply(e, tail), op.log(op.add(one, e)))
    return node.emit(op.add(op.maximum(x, number(node, 0)), log))


def _softplus(node: OpNode) -> Any:
    return _softplus_of(node, node.input(0))


def _mish(node: OpNode) -> Any:
    from tvm import relax

    x = node.input(0)
    return relax.op.multiply(x, relax.op.tanh(_softplus_of(node, x)))


CONVERTERS: dict[str, Converter] = {
    "BitCast": _bit_cast,
    "BitShift": _bit_shift,
    "Celu": _celu,
    "Dropout": _dropout,
    "Elu": _elu,
    "EyeLike": _eye_like,
    "IsInf": _is_inf,
    "Mish": _mish,
    "Mod": _mod,
    "OneHot": _one_hot,
    "PRelu": _prelu,
    "Pow": _pow,
    "Softplus": _softplus,
    "Swish": _swish,
}
