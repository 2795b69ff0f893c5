"""Products of four 8-bit pairs a lane as the instruction that the target has for them.

A schedule marks the loop over lanes with :data:`DOT`; its body, a loop over four neighbouring values, is

    acc[lane] += int32(data[k]) * int32(weights[lane, k])        k = 0, 1, 2, 3

After lowering, each such pair of loops becomes one vector expression.  Instructions (LLVM 22's intrinsics):

- ``vnni512``, ``vnni256``: ``vpdpbusd`` (AVX-512 VNNI or AVX-VNNI), u8 data and s8 weights, nothing saturates.
- ``avx2``: ``vpmaddubsw`` adds two products in 16 bits and saturates.  Where the weights allow a sum beyond 16
  bits, even and odd values are multiplied apart, so that each sum has one term; ``vpmaddwd`` with ones adds up.
- ``sdot``: s8 data and s8 weights (Armv8.2 dot product).
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm

DOT = "toolchain.dot"
"""Loop annotation: :data:`FITS` or :data:`SATURATES`."""
FITS = 1
"""Two neighbouring products always fit in 16 bits."""
SATURATES = 2
"""They may not."""

QUAD = 4
"""Values that one instruction adds in each lane."""

DATA_TYPE = {"vnni512": "uint8", "vnni256": "uint8", "avx2": "uint8", "sdot": "int8"}
"""The type of data that an instruction multiplies with s8 weights."""


def dot_products(dot: str) -> Any:
    """A pass over lowered loop nests; ``dot`` is a key of :data:`DATA_TYPE`, or "" where no loop is marked."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    def replace(loop: Any) -> Any:
        mark = loop.annotations.get(DOT, None) if loop.annotations else None
        return loop if mark is None else _vector_form(loop, dot, int(mark))

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.dot_products")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, replace)))

    return tvm.ir.transform.Sequential([apply])


def _vector_form(loop: Any, dot: str, mark: int) -> Any:
    from tvm import tirx

    lanes, lane = int(loop.extent), loop.loop_var
    inner = loop.body
    assert isinstance(inner, tirx.For), "a marked loop holds one over four values"
    store, first = _store_at(inner.body, {lane: 0, inner.loop_var: 0})
    product = store.value.b
    data, weights = product.a.value, product.b.value
    accumulator = _vector(store.buffer, first(store.indices), lanes)
    return tirx.BufferStore(
        store.buffer,
        _dot(
            dot,
            accumulator,
            _repeated(_vector(data.source, first(data.indices), QUAD), lanes),
            _vector(weights.source, first(weights.indices), QUAD * lanes),
            mark,
        ),
        [*first(store.indices)[:-1], tirx.Ramp(first(store.indices)[-1], 1, lanes)],
    )


def _store_at(body: Any, values: dict[Any, int]) -> tuple[Any, Any]:
    """The only store of ``body``, and a function that evaluates indices where variables have ``values``."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    known: dict[Any, Any] = {v: tirx.const(n, str(v.ty.dtype)) for v, n in values.items()}
    analyzer = tvm.sym.Analyzer()
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]

    def evaluated(expression: Any) -> Any:
        return tvm_ffi.structural_map(expression, (type(next(iter(values))), lambda v: known.get(v, v)))

    for statement in statements[:-1]:
        # Common subexpressions, bound before the store.
        known[statement.var] = evaluated(statement.value)

    def first(indices: Any) -> list[Any]:
        return [analyzer.simplify(evaluated(index)) for index in indices]

    return statements[-1], first


def _vector(buffer: Any, indices: list[Any], lanes: int) -> Any:
    from tvm import tirx

    return tirx.BufferLoad(buffer, [*indices[:-1], tirx.Ramp(indices[-1], 1, lanes)])


def _repeated(quad: Any, lanes: int) -> Any:
    """Four bytes, over and over, as signed bytes: what LLVM's intrinsics take."""
    from tvm import tirx

    word = tirx.reinterpret("int32", quad)
    return tirx.reinterpret(f"int8x{QUAD * lanes}", tirx.Broadcast(word, lanes))


def _dot(dot: str, accumulator: Any, data: Any, weights: Any, mark: int) -> Any:
    if dot in ("vnni512", "vnni256"):
        return _call(f"llvm.x86.avx512.vpdpbusd.{dot[4:]}", "int32x" + _lanes(dot), accumulator, data, weights)
    if dot == "sdot":
        return _call("llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4", accumulator, data, weights)
    if mark == FITS:
        return accumulator + _pairs(data, weights)
    even = _mask(weights, 0x00FF)
    odd = _mask(weights, 0xFF00)
    return accumulator + _pairs(data, even) + _pairs(data, odd)


def _lanes(dot: str) -> str:
    return str(int(dot[4:]) // 32)


def _pairs(data: Any, weights: Any) -> Any:
    """Sums of four products by vpmaddubsw and vpmaddwd."""
    from tvm import tirx

    twos = _call("llvm.x86.avx2.pmadd.ub.sw", "int16x16", data, weights)
    ones = tirx.Broadcast(tirx.const(1, "int16"), 16)
    return _call("llvm.x86.avx2.pmadd.wd", "int32x8", twos, ones)


def _mask(weights: Any, mask: int) -> Any:
    from tvm import tirx

    halves = tirx.reinterpret("int16x16", weights)
    signed = mask if mask < 1 << 15 else mask - (1 << 16)
    return tirx.reinterpret("int8x32", halves & tirx.Broadcast(tirx.const(signed, "int16"), 16))


def _call(name: str, dtype: str, *operands: Any) -> Any:
    from tvm import tirx

    return tirx.call_llvm_pure_intrin(dtype, name, *operands)
