"""Exponential, logarithm, error function, hyperbolic tangent and logistic function of float32 as polynomials.

LLVM has no vector form of these functions without a vector math library: one call per element is left, which
made GELU cost as much as the matrix products around it.  Polynomials of a few multiplications vectorize with the
loop that they stand in.  Each is accurate to a few units in the last place over the whole range of float32
(tests compare with numpy's float64), treats infinities as the function does, and keeps NaN.

Sources: exp and log by argument reduction with the coefficients of the Cephes library (``expf.c``, ``logf.c``); tanh by
the rational minimax approximation of degree 13/6 that Eigen uses (``ptanh_float``), x itself near zero; erf by the
rational approximation of degree 13/8 on [-4, 4] that Eigen used (``perf`` of version 3.4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolchain.tvm.library import load_tvm

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_TANH_ODD = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_ODD = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_EVEN = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
    -1.42647390514189e-02,
)  # fmt: skip


def vector_functions() -> Any:
    """A pass over loop nests that writes the functions out."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import ir, tirx

    forms = {"tirx.exp": exp, "tirx.log": log, "tirx.erf": erf, "tirx.tanh": tanh, "tirx.sigmoid": sigmoid}

    def write_out(call: Any) -> Any:
        form = forms.get(str(call.op.name)) if isinstance(call.op, ir.Op) else None
        if form is None or str(call.ty.dtype) != "float32":
            return call
        return form(call.args[0])

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.vector_functions")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, write_out)))

    return tvm.ir.transform.Sequential([apply])


def _constant(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _horner(x: Any, coefficients: tuple[float, ...]) -> Any:
    value = _constant(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _constant(coefficient)
    return value


def _bind(name: str, value: Any, body: Callable[[Any], Any]) -> Any:
    """``body`` of a variable bound to ``value``: written out instead, each use would copy the expression."""
    from tvm import tirx

    variable = tirx.Var(name, str(value.ty.dtype))
    return tirx.Let(variable, value, body(variable))


def _clamp(x: Any, low: float, high: float) -> Any:
    """``x`` within bounds; NaN stays NaN, as both comparisons are false for it."""
    from tvm import tirx

    def bounded(v: Any) -> Any:
        return tirx.Select(v > _constant(high), _constant(high), tirx.Select(v < _constant(low), _constant(low), v))

    return _bind("x", x, bounded)


def exp(x: Any) -> Any:
    """2^n * e^r with n = round(x / ln 2) and r within ln 2 / 2; 0 below -103.97, infinity above 88.72."""
    from tvm import tirx

    def of_bounded(v: Any) -> Any:
        return _bind("n", tirx.floor(v * _constant(1.44269504088896341) + _constant(0.5)), lambda n: of_parts(v, n))

    def of_parts(v: Any, n: Any) -> Any:
        rest = v - n * _constant(0.693359375) - n * _constant(-2.12194440e-4)
        # In two steps: n down to -150 reaches the subnormal numbers, n up to 128 infinity.
        whole = tirx.Cast("int32", n)
        half = whole >> tirx.const(1, "int32")
        first, second = _power_of_two(half), _power_of_two(whole - half)
        return _bind("r", rest, lambda r: (_horner(r, _EXP) * r * r + r + _constant(1.0)) * first * second)

    return _bind("v", _clamp(x, -104.0, 88.8), of_bounded)


def log(x: Any) -> Any:
    """Sum of e ln 2 and a polynomial for 1 + m, where x = 2^e (1 + m) and m lies around 0; x of any sign and size."""
    from tvm import tirx

    least, root = 1.17549435e-38, 0.70710678118654752440

    def of(v: Any) -> Any:
        tiny = v < _constant(least)  # subnormal numbers are scaled by 2^23
        scaled = tirx.Select(tiny, v * _constant(8388608.0), v)
        normal = _bind("w", scaled, lambda w: of_bits(w, tirx.Select(tiny, _constant(23.0), _constant(0.0))))
        below = tirx.Select(tirx.EQ(v, _constant(0.0)), _constant(float("-inf")), _constant(float("nan")))
        return tirx.Select(v > _constant(0.0), tirx.Select(v < _constant(float("inf")), normal, v), below)

    def of_bits(w: Any, scale: Any) -> Any:
        bits, place = tirx.reinterpret("int32", w), tirx.const(23, "int32")
        exponent = bits >> place
        mantissa = tirx.reinterpret("float32", bits - (exponent << place) + tirx.const(0x3F000000, "int32"))
        power = tirx.Cast("float32", exponent - tirx.const(126, "int32")) - scale
        return _bind("m", mantissa, lambda m: of_parts(m, power))

    def of_parts(m: Any, e: Any) -> Any:
        low = m < _constant(root)
        power = e - tirx.Select(low, _constant(1.0), _constant(0.0))
        fraction = tirx.Select(low, m + m, m) - _constant(1.0)
        return _bind("e", power, lambda n: _bind("f", fraction, lambda f: polynomial(f, n)))

    def polynomial(f: Any, n: Any) -> Any:
        square = f * f
        small = _horner(f, _LOG) * f * square + n * _constant(-2.12194440e-4) - _constant(0.5) * square
        return f + small + n * _constant(0.693359375)

    return _bind("v", x, of)


def _power_of_two(n: Any) -> Any:
    from tvm import tirx

    return tirx.reinterpret("float32", (n + tirx.const(127, "int32")) << tirx.const(23, "int32"))


def sigmoid(x: Any) -> Any:
    """(1 + tanh(x / 2)) / 2: cheaper than by way of exp, and as exact in the absolute (2.4e-7)."""
    return tanh(x * _constant(0.5)) * _constant(0.5) + _constant(0.5)


def tanh(x: Any) -> Any:
    """Odd over even polynomial on [-9, 9], beyond which float32 knows only 1."""
    from tvm import tirx

    def rational(v: Any) -> Any:
        return _bind("s", v * v, lambda s: v * _horner(s, _TANH_ODD) / _horner(s, _TANH_EVEN))

    def of(v: Any) -> Any:
        return tirx.Select(tirx.abs(v) < _constant(4e-4), v, _bind("b", _clamp(v, -9.0, 9.0), rational))

    return _bind("t", x, of)


def erf(x: Any) -> Any:
    """Odd over even polynomial on [-4, 4], beyond which float32 knows only 1."""

    def rational(v: Any) -> Any:
        return _bind("s", v * v, lambda s: v * _horner(s, _ERF_ODD) / _horner(s, _ERF_EVEN))

    return _clamp(_bind("b", _clamp(x, -4.0, 4.0), rational), -1.0, 1.0)
