"""Products of four 8-bit pairs a lane as the instruction that the target has for them.

A schedule marks the loop over lanes with :data:`DOT`; its body, a loop over four neighbouring values, is

    acc[lane] += int32(data[k]) * int32(weights[lane, k])        k = 0, 1, 2, 3

or up to 7.  After lowering, each such pair of loops becomes one vector expression.  Instructions (LLVM 22):

- ``vnni512``, ``vnni256``: ``vpdpbusd`` (AVX-512 VNNI or AVX-VNNI), u8 data and s8 weights, nothing saturates.
- ``avx2``: ``vpmaddubsw`` adds two products in 16 bits and saturates.  Where the weights allow a sum beyond 16
  bits, even and odd values are multiplied apart, so that each sum has one term; ``vpmaddwd`` with ones adds up.
- ``neon``, ``neon32``: s8 data and s8 weights on Arm without dot products.  ``smull`` multiplies two values of four
  lanes to 16 bits, ``smlal`` adds the other two, ``sadalp`` adds neighbours to the sums: three instructions for 16
  products, as in XNNPACK's kernels "c2, mlal".  A 16-bit sum overflows only where both weights are -128; such
  products are added one by one.  Weights lie as (values in twos, lanes, 2).  ``neon32`` has Armv7's names.
- ``sdot``: s8 data and s8 weights (Armv8.2 dot product).
- ``i8mm``: ``smmla`` and ``usmmla`` (Armv8.6), 2x8 values of data with 8x2 of weights, where the loop over lanes holds
  one over eight values (:mod:`toolchain.tvm.loops.i8mm`); else ``sdot``, and ``usdot`` for u8 data.
"""

from __future__ import annotations

from collections.abc import Callable
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

OCTET = 8
"""Values that an instruction on matrices adds in each lane."""
PAIR = 2
"""Rows and columns of such a matrix; also the values that NEON's ``smull`` takes of a lane."""

DATA_TYPE = {
    "vnni512": "uint8", "vnni256": "uint8", "avx2": "uint8",
    "neon": "int8", "neon32": "int8", "sdot": "int8", "i8mm": "",
}  # fmt: skip
"""The type of data that an instruction multiplies with s8 weights; "": either."""

NEON = ("neon", "neon32")
"""Those without an instruction for four products a lane."""

_NEON_CALLS = {
    "neon": ("llvm.aarch64.neon.smull.v8i16", "llvm.aarch64.neon.saddlp.v4i32.v8i16"),
    "neon32": ("llvm.arm.neon.vmulls.v8i16", "llvm.arm.neon.vpadals.v4i32.v8i16"),
}


def grouping(dot: str) -> tuple[int, int]:
    """How many values of a lane are multiplied together, and how many of these are neighbours in packed weights."""
    if not dot:
        return 1, 1
    return QUAD, PAIR if dot in NEON else QUAD


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

    lanes, inner = int(loop.extent), loop.body
    assert isinstance(inner, tirx.For), "a marked loop holds one over neighbouring values"
    depth = int(inner.extent)
    store, at = _store_of(inner.body, loop.loop_var, inner.loop_var)
    product = store.value.b
    data, weights = product.a.value, product.b.value
    accumulator = _vector(store.buffer, at(store.indices, 0, 0), lanes)
    factors = _vector(weights.source, at(weights.indices, 0, 0), lanes * QUAD)
    if depth == OCTET:
        rows = [[at(data.indices, row * PAIR, k) for k in (0, QUAD)] for row in range(PAIR)]
        value = _matrix(accumulator, _two_rows(data.source, rows), factors, signed=_is_signed(data))
    elif dot in NEON:
        halves = [_vector(weights.source, at(weights.indices, 0, k), OCTET) for k in range(0, QUAD, PAIR)]
        value = _neon(dot, accumulator, _vector(data.source, at(data.indices, 0, 0), QUAD), halves, mark)
    else:
        quads = _repeated(_vector(data.source, at(data.indices, 0, 0), QUAD), lanes)
        value = _dot(dot, accumulator, quads, factors, mark, signed=_is_signed(data))
    target = at(store.indices, 0, 0)
    return tirx.BufferStore(store.buffer, value, [*target[:-1], tirx.Ramp(target[-1], 1, lanes)])


def _is_signed(data: Any) -> bool:
    return str(data.source.dtype) == "int8"


def _store_of(body: Any, lane: Any, inner: Any) -> tuple[Any, Callable[[Any, int, int], list[Any]]]:
    """The only store of ``body``, and a function that evaluates indices at values of the two loops."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    analyzer = tvm.sym.Analyzer()
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]

    def at(indices: Any, lane_value: int, inner_value: int) -> list[Any]:
        known = {lane: tirx.const(lane_value, str(lane.ty.dtype)), inner: tirx.const(inner_value, str(inner.ty.dtype))}

        def evaluated(expression: Any) -> Any:
            return tvm_ffi.structural_map(expression, (type(lane), lambda v: known.get(v, v)))

        for statement in statements[:-1]:
            # Common subexpressions, bound before the store.
            known[statement.var] = evaluated(statement.value)
        return [analyzer.simplify(evaluated(index)) for index in indices]

    return statements[-1], at


def _two_rows(buffer: Any, rows: list[list[list[Any]]]) -> Any:
    """Two rows of eight bytes as a vector of sixteen; ``rows``: indices of each row's two halves.

    Where bytes are neighbours, be it halves of a row or the same half of both, they are loaded together.
    """
    from tvm import tirx

    (top, top_rest), (bottom, bottom_rest) = rows
    if _follows(top, top_rest) and _follows(bottom, bottom_rest):
        return _joined([_vector(buffer, top, OCTET), _vector(buffer, bottom, OCTET)], [0, 1, 2, 3])
    if _follows(top, bottom) and _follows(top_rest, bottom_rest):
        return _joined([_vector(buffer, top, OCTET), _vector(buffer, top_rest, OCTET)], [0, 2, 1, 3])
    words = [tirx.reinterpret("int32", _vector(buffer, half, QUAD)) for row in rows for half in row]
    return tirx.reinterpret("int8x16", tirx.Shuffle(words, list(range(4))))


def _follows(first: list[Any], second: list[Any]) -> bool:
    """Whether the four bytes at ``second`` come right after those at ``first``."""
    analyzer = load_tvm().sym.Analyzer()
    same = all(analyzer.can_prove_equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    return same and analyzer.can_prove_equal(second[-1] - first[-1], QUAD)


def _joined(vectors: list[Any], words: list[int]) -> Any:
    """Words of four bytes out of vectors of two such words."""
    from tvm import tirx

    pairs = [tirx.reinterpret("int32x2", vector) for vector in vectors]
    return tirx.reinterpret("int8x16", tirx.Shuffle(pairs, words))


def _vector(buffer: Any, indices: list[Any], lanes: int) -> Any:
    from tvm import tirx

    return tirx.BufferLoad(buffer, [*indices[:-1], tirx.Ramp(indices[-1], 1, lanes)])


def _repeated(quad: Any, lanes: int) -> Any:
    """Four bytes, over and over, as signed bytes: what LLVM's intrinsics take."""
    from tvm import tirx

    word = tirx.reinterpret("int32", quad)
    return tirx.reinterpret(f"int8x{QUAD * lanes}", tirx.Broadcast(word, lanes))


def _matrix(accumulator: Any, data: Any, weights: Any, *, signed: bool) -> Any:
    name = "smmla" if signed else "usmmla"
    return _call(f"llvm.aarch64.neon.{name}.v4i32.v16i8", "int32x4", accumulator, data, weights)


def _dot(dot: str, accumulator: Any, data: Any, weights: Any, mark: int, *, signed: bool) -> Any:
    if dot in ("vnni512", "vnni256"):
        return _call(f"llvm.x86.avx512.vpdpbusd.{dot[4:]}", "int32x" + _lanes(dot), accumulator, data, weights)
    if dot in ("sdot", "i8mm"):
        name = "sdot" if signed else "usdot"
        return _call(f"llvm.aarch64.neon.{name}.v4i32.v16i8", "int32x4", accumulator, data, weights)
    if mark == FITS:
        return accumulator + _pairs(data, weights)
    even = _mask(weights, 0x00FF)
    odd = _mask(weights, 0xFF00)
    return accumulator + _pairs(data, even) + _pairs(data, odd)


def _neon(dot: str, accumulator: Any, quad: Any, weights: list[Any], mark: int) -> Any:
    """``quad``: four bytes of data; ``weights``: first two values of four lanes, then the other two.

    The halves are loaded apart: LLVM would move the upper one of a whole vector down before each use.
    """
    from tvm import tirx

    multiply, add_neighbours = _NEON_CALLS[dot]
    twos = tirx.reinterpret("int16x2", quad)
    products = []
    for half, factors in enumerate(weights):
        data = tirx.reinterpret("int8x8", tirx.Broadcast(tirx.Shuffle([twos], [half]), QUAD))
        products.append(_call(multiply, "int16x8", factors, data))
    sums = [products[0] + products[1]] if mark == FITS else products
    for pairs in sums:
        if dot == "neon32":
            accumulator = _call(add_neighbours, "int32x4", accumulator, pairs)
        else:
            accumulator = accumulator + _call(add_neighbours, "int32x4", pairs)
    return accumulator


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
