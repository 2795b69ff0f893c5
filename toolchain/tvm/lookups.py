"""Tables of 256 bytes read a vector at a time, where the target's instructions permute whole registers.

After vectorization a lookup is a load at a vector of places that come from bytes, which LLVM takes apart: a load for
each lane.  The table fits in four 512-bit registers:

- ``vbmi``: ``vpermi2b`` takes a byte out of two of them; two such, and the highest bit of the index chooses.
- ``words``: AVX-512 without VBMI has ``vpermi2w``, 16 bits out of 64; the lowest bit of the index chooses the half.

Elsewhere ("") the loads stay.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm

ENTRIES = 256
_BYTES = ("int8", "uint8")
_WIDTH = 64
"""Bytes of a register."""


def vector_lookups(form: str) -> Any:
    """A pass over lowered loop nests; ``form``: see :meth:`toolchain.tvm.machine.Machine.lookup`."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import ir, tirx

    def replace(load: Any) -> Any:
        codes = _codes(load)
        return load if codes is None else _FORMS[form](load, codes, int(codes.ty.dtype.lanes))

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.vector_lookups")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (ir.TensorLoad, replace)))

    return tvm.ir.transform.Sequential([apply] if form else [])


def _codes(load: Any) -> Any:
    """The vector of bytes at which ``load`` reads a table, or None."""
    from tvm import tirx

    buffer = load.source
    if (
        str(buffer.dtype) not in _BYTES
        or len(buffer.shape) != 1
        or int(getattr(buffer.shape[0], "value", 0)) != ENTRIES
    ):
        return None
    index = load.indices[0]
    if not isinstance(index, tirx.Cast) or not str(index.value.ty.dtype).startswith("uint8x"):
        return None
    lanes = int(index.value.ty.dtype.lanes)
    return index.value if lanes <= _WIDTH // 2 and _WIDTH % lanes == 0 else None


def _vbmi(load: Any, codes: Any, lanes: int) -> Any:
    from tvm import tirx

    quarters = [tirx.reinterpret("int8x64", _part(load.source, i)) for i in range(4)]
    wide = tirx.reinterpret("int8x64", _widened(codes, lanes, _WIDTH))
    low, high = (
        _call("llvm.x86.avx512.vpermi2var.qi.512", "int8x64", quarters[i], wide, quarters[i + 1]) for i in (0, 2)
    )
    chosen = tirx.Select(wide < tirx.Broadcast(tirx.const(0, "int8"), _WIDTH), high, low)
    return tirx.reinterpret(str(load.ty.dtype), _first(chosen, lanes))


def _words(load: Any, codes: Any, lanes: int) -> Any:
    from tvm import tirx

    half = _WIDTH // 2

    def all_lanes(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "int16"), half)

    quarters = [tirx.reinterpret("int16x32", _part(load.source, i)) for i in range(4)]
    wide = tirx.Cast("int16x32", _widened(codes, lanes, half))
    words = wide >> all_lanes(1)
    low, high = (
        _call("llvm.x86.avx512.vpermi2var.hi.512", "int16x32", quarters[i], words, quarters[i + 1]) for i in (0, 2)
    )
    pair = tirx.Select(wide < all_lanes(ENTRIES // 2), low, high)
    odd = tirx.Select((wide & all_lanes(1)) > all_lanes(0), pair >> all_lanes(8), pair)
    return tirx.reinterpret(str(load.ty.dtype), _first(tirx.Cast("int8x32", odd), lanes))


_FORMS = {"vbmi": _vbmi, "words": _words}


def _part(table: Any, index: int) -> Any:
    from tvm import tirx

    return tirx.BufferLoad(table, [tirx.Ramp(tirx.const(index * _WIDTH, "int32"), 1, _WIDTH)])


def _widened(codes: Any, lanes: int, width: int) -> Any:
    """``codes`` and zeros: what a register holds beside them costs nothing."""
    from tvm import tirx

    zeros = tirx.Broadcast(tirx.const(0, "uint8"), lanes)
    return codes if lanes == width else tirx.Shuffle([codes] + [zeros] * (width // lanes - 1), list(range(width)))


def _first(values: Any, lanes: int) -> Any:
    from tvm import tirx

    return values if int(values.ty.dtype.lanes) == lanes else tirx.Shuffle([values], list(range(lanes)))


def _call(name: str, dtype: str, *operands: Any) -> Any:
    from tvm import tirx

    return tirx.call_llvm_pure_intrin(dtype, name, *operands)
