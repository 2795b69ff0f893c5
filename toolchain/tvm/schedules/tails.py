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

GUARD = "toolchain.guard"
"""The same for a short loop inside a tile: it stays one loop, and each iteration asks whether it is whole."""

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

    if GUARD in loop.annotations:
        return _guarded(loop, int(loop.annotations[GUARD]))
    if TAIL not in loop.annotations:
        return loop
    variable, lanes = loop.loop_var, int(loop.annotations[TAIL])
    dtype = str(variable.ty.dtype)
    whole = _whole(loop, lanes)
    main = tirx.For(variable, tirx.IntImm(dtype, 0), whole, loop.kind, _certain(loop.body, variable))
    last = tirx.Var(f"{variable.name}_tail", dtype)
    rest = tvm_ffi.structural_map(_scalar(loop.body), (ir.Var, lambda v: last if v.same_as(variable) else v))
    return tirx.SeqStmt([main, tirx.For(last, whole, loop.extent - whole, loop.kind, rest)])


def _guarded(loop: Any, lanes: int) -> Any:
    from tvm import tirx

    variable = loop.loop_var
    whole = variable < _whole(loop, lanes)
    body = tirx.IfThenElse(whole, _certain(loop.body, variable), _scalar(loop.body))
    return tirx.For(variable, loop.min, loop.extent, loop.kind, body)


def _whole(loop: Any, lanes: int) -> Any:
    """Iterations of which every lane holds the condition in the body: place of the element < bound."""
    import tvm_ffi
    from tvm import ir, tirx

    tvm = load_tvm()
    inner: list[Any] = [loop.loop_var]
    bindings: dict[Any, Any] = {}
    found: list[Any] = []

    def nested(statement: Any) -> Any:
        inner.append(statement.loop_var)
        return statement

    def realize(block: Any) -> Any:
        bindings.update(zip((v.var for v in block.block.iter_vars), block.iter_values, strict=True))
        found.extend(part for part in _parts(block.predicate) if _mentions(part, loop.loop_var))
        return block

    def store(statement: Any) -> Any:
        if operator_name(statement.value) == IF:
            found.append(statement.value.args[0])
        return statement

    def first(variable: Any) -> Any:
        if any(variable.same_as(known) for known in inner):
            return tirx.IntImm(str(variable.ty.dtype), 0)
        return next((value for name, value in bindings.items() if variable.same_as(name)), variable)

    from tvm import s_tir

    tvm_ffi.structural_map(loop.body, [(tirx.For, nested), (s_tir.SBlockRealize, realize), (tirx.BufferStore, store)])
    assert len(found) == 1, found
    place = found[0].a
    for _ in range(2):  # block variables first, then the loops that they are bound to
        place = tvm_ffi.structural_map(place, (ir.Var, first))
    dtype = str(loop.loop_var.ty.dtype)
    least = tvm.sym.Analyzer().simplify(tirx.max(found[0].b - place, tirx.const(0, str(place.ty.dtype))) // lanes)
    return tirx.min(tirx.Cast(dtype, least), tirx.Cast(dtype, loop.extent))


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
