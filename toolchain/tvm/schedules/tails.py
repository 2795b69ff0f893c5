"""Loops over vectors with a ragged end: a part in whole vectors without conditions, then the rest, one by one.

A schedule splits such a loop by the lanes of a vector and annotates the outer one with :data:`TAIL`; afterwards
:func:`split_tails` makes two loops of it.  (TVM's own partition of loops mixes 32- and 64-bit integers where sizes
are symbolic, and fails.)
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm

TAIL = "toolchain.tail"
"""How many elements an iteration of the annotated loop has."""

IF = "prim.if_then_else"


def operator_name(value: Any) -> str:
    """Name of the operator that an expression of a loop nest calls, or ``""``."""
    from tvm import ir

    return str(value.op.name) if isinstance(value, ir.Call) and isinstance(value.op, ir.Op) else ""


def split_tails() -> Any:
    """The pass, over scheduled loop nests."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.split_tails")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, _split)))

    return tvm.ir.transform.Sequential([apply])


def _split(loop: Any) -> Any:
    import tvm_ffi
    from tvm import ir, tirx

    if TAIL not in loop.annotations:
        return loop
    variable, lanes = loop.loop_var, int(loop.annotations[TAIL])
    dtype = str(variable.ty.dtype)
    least = _bound(loop.body, variable) // lanes
    whole = tirx.IntImm(dtype, int(least)) if hasattr(least, "value") else tirx.Cast(dtype, least)
    main = tirx.For(variable, tirx.IntImm(dtype, 0), whole, loop.kind, _certain(loop.body, variable))
    last = tirx.Var(f"{variable.name}_tail", dtype)
    rest = tvm_ffi.structural_map(_scalar(loop.body), (ir.Var, lambda v: last if v.same_as(variable) else v))
    return tirx.SeqStmt([main, tirx.For(last, whole, loop.extent - whole, loop.kind, rest)])


def _bound(body: Any, variable: Any) -> Any:
    """What the conditions in ``body`` say that the element's index is less than."""
    import tvm_ffi
    from tvm import s_tir, tirx

    found: list[Any] = []

    def realize(block: Any) -> Any:
        found.extend(part.b for part in _parts(block.predicate) if _mentions(part, variable))
        return block

    def store(statement: Any) -> Any:
        if operator_name(statement.value) == IF:
            found.append(statement.value.args[0].b)
        return statement

    tvm_ffi.structural_map(body, [(s_tir.SBlockRealize, realize), (tirx.BufferStore, store)])
    assert len(found) == 1, found
    return found[0]


def _certain(body: Any, variable: Any) -> Any:
    """``body`` where the conditions on ``variable`` hold."""
    import tvm_ffi
    from tvm import s_tir, tirx

    def realize(block: Any) -> Any:
        kept = [part for part in _parts(block.predicate) if not _mentions(part, variable)]
        predicate = tirx.all(*kept) if kept else tirx.const(True, "bool")
        return s_tir.SBlockRealize(block.iter_values, predicate, block.block)

    def store(statement: Any) -> Any:
        if operator_name(statement.value) != IF:
            return statement
        return tirx.BufferStore(statement.buffer, statement.value.args[1], statement.indices)

    return tvm_ffi.structural_map(body, [(s_tir.SBlockRealize, realize), (tirx.BufferStore, store)])


def _parts(condition: Any) -> list[Any]:
    from tvm import tirx

    if isinstance(condition, tirx.And):
        return [*_parts(condition.a), *_parts(condition.b)]
    return [condition]


def _mentions(expression: Any, variable: Any) -> bool:
    from tvm import tirx

    return any(found.same_as(variable) for found in tirx.analysis.undefined_vars(expression, []))


def _scalar(body: Any) -> Any:
    """``body`` without vectors."""
    import tvm_ffi
    from tvm import tirx

    def serial(loop: Any) -> Any:
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, serial))
