"""Loops that read along one axis and write along another: square tiles, transposed in registers.

A change of layout reads memory in order along one loop and writes it in order along another, so that a vector over
either would be gathered, or scattered, element by element.  :func:`transposed` cuts both loops into tiles of v x v;
:func:`transpose_tiles` then has each tile read in v vectors along the first, turned by log2(v) rounds of shuffles of
two vectors, and used in v vectors along the second.  (Source of the rounds: Eklundh, "A fast computer method for matrix
transposing", 1972: in round d, elements whose row and column numbers differ in bit d change places.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import extent, lanes_of, parallel, work_of
from toolchain.tvm.schedules.tails import IF, operator_name

TILE = "toolchain.transposed"
"""Annotation of the outer of a tile's two loops: the number of its rows, and of its columns."""

_MOST = 16
"""Rows of a tile at most: the vectors on both sides of a round are in registers."""

_SINGLE = 3
"""What a value outside whole tiles costs, in loads of a vector: measured, as its store or load walks across memory."""

_DTYPES = ("float32", "float16", "int8", "uint8", "int32")


def transposed(schedule: Any, block: Any, machine: Machine) -> bool:
    """Cuts the loops of ``block`` into tiles and marks them, if some value is read along another axis than written."""
    loops, body = schedule.get_loops(block), schedule.get(block)
    if len(loops) < 2 or len(body.iter_vars) != len(loops) or len(body.writes) != 1:
        return False
    *_, last = body.writes[0].region
    across = body.iter_vars[-1].var
    if not last.min.same_as(across):
        return False
    most = min(_MOST, lanes_of(schedule, block, machine), extent(schedule, loops[-1]) or _MOST)
    sizes = [extent(schedule, loop) or _MOST for loop in loops[:-1]]
    places = reversed(range(len(sizes)))
    choices = ((i, v) for i in places for v in _tiles(sizes[i], most))
    index, rows = next(((i, v) for i, v in choices if _gathered(body, i, v)), (0, 0))
    if not rows:
        return False
    outer = [loop for place, loop in enumerate(loops[:-1]) if place != index]
    work = work_of(schedule, loops)
    row_outer, row = schedule.split(loops[index], [None, rows])
    column_outer, column = schedule.split(loops[-1], [None, rows])
    schedule.reorder(*outer, row_outer, column_outer, row, column)
    schedule.annotate(row, TILE, rows)
    parallel(schedule, [*outer, row_outer], work)
    return True


def _tiles(size: int, most: int) -> list[int]:
    """Rows of tiles to try for ``size`` values, the cheapest first: those outside whole tiles go one by one."""

    def cost(rows: int) -> float:
        whole = size // rows * rows
        return whole * (2 + math.log2(rows)) / rows + _SINGLE * (size - whole)

    return sorted((rows for rows in (16, 8, 4) if rows <= min(most, size)), key=cost)


def _gathered(block: Any, index: int, rows: int) -> list[Any]:
    """Loads in ``block`` that walk memory in order along its variable ``index``, and not along the last one."""
    import tvm_ffi
    from tvm import ir, tirx

    tvm = load_tvm()
    found: list[Any] = []
    along, across, domain = block.iter_vars[index].var, block.iter_vars[-1].var, block.iter_vars[index].dom
    dtype = str(along.ty.dtype)
    tile, place = tirx.Var("tile", dtype), tirx.Var("place", dtype)
    analyzer = tvm.sym.Analyzer()
    for variable in block.iter_vars:
        analyzer.bind(variable.var, variable.dom)
    analyzer.bind(tile, tvm.ir.Range(0, (domain.extent + rows - 1) // rows))
    analyzer.bind(place, tvm.ir.Range(0, rows))

    def visit(load: Any) -> None:
        if str(load.source.ty.dtype) not in _DTYPES or any(load.same_as(known) for known in found):
            return
        if not _mentioned(load.indices, across) or _steps(load.indices, across, analyzer):
            return
        inside = tile * tirx.const(rows, dtype) + place
        if _steps([_replace(value, along, inside) for value in load.indices], place, analyzer):
            found.append(load)

    tvm_ffi.structural_walk(block.body, (ir.TensorLoad, visit))
    return found


def _mentioned(indices: Sequence[Any], variable: Any) -> bool:
    from tvm import tirx

    return any(used.same_as(variable) for index in indices for used in tirx.analysis.undefined_vars(index, []))


def _replace(expression: Any, variable: Any, value: Any) -> Any:
    import tvm_ffi
    from tvm import ir

    return tvm_ffi.structural_map(expression, (ir.Var, lambda v: value if v.same_as(variable) else v))


def _steps(indices: Sequence[Any], variable: Any, analyzer: Any) -> bool:
    """Whether neighbours in ``variable`` are neighbours in memory."""
    *rest, last = [analyzer.simplify(index) for index in indices]
    distance = analyzer.simplify(last - variable)
    return not _mentioned([*rest, distance], variable)


def transpose_tiles() -> Any:
    """The pass that writes marked tiles out, over scheduled loop nests."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.transpose_tiles")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, _written_out)))

    return tvm.ir.transform.Sequential([apply])


def _written_out(loop: Any) -> Any:
    from tvm import tirx

    if TILE not in loop.annotations:
        return loop
    rows, inner = int(loop.annotations[TILE]), loop.body
    plain = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, inner)
    realize = inner.body
    index = next(i for i, value in enumerate(realize.iter_values) if _mentioned([value], loop.loop_var))
    leaves = _leaves(realize.block, index, rows)
    if not leaves:
        return plain
    tile = _Tile(realize, loop.loop_var, inner.loop_var, rows)
    whole = realize.predicate
    for variable in (loop.loop_var, inner.loop_var):
        whole = _replace(whole, variable, tirx.const(rows - 1, str(variable.ty.dtype)))
    return tirx.IfThenElse(load_tvm().sym.Analyzer().simplify(whole), tile.written_out(leaves), plain)


def _leaves(block: Any, index: int, rows: int) -> list[Any]:
    """What is turned: a load, or the condition that guards it, as memory beyond the guard may not be read."""
    import tvm_ffi
    from tvm import ir

    loads = _gathered(block, index, rows)
    guarded: list[Any] = []

    def visit(call: Any) -> None:
        if operator_name(call) == IF and any(_contains(call, load) for load in loads):
            guarded.append(call)

    tvm_ffi.structural_walk(block.body.value, (ir.Call, visit))
    outermost = [g for g in guarded if not any(other is not g and _contains(other, g) for other in guarded)]
    free = [load for load in loads if not any(_contains(guard, load) for guard in outermost)]
    return [*free, *outermost]


def _contains(expression: Any, part: Any) -> bool:
    import tvm_ffi
    from tvm import ir

    found = False

    def visit(node: Any) -> None:
        nonlocal found
        found = found or (node.same_as(part) and not expression.same_as(part))

    tvm_ffi.structural_walk(expression, (ir.Expr, visit))
    return found


class _Tile:
    """One tile of a block's store: ``rows`` rows of as many columns."""

    def __init__(self, realize: Any, row: Any, column: Any, rows: int) -> None:
        self._realize, self._row, self._column, self._rows = realize, row, column, rows

    def _placed(self, part: Any) -> Any:
        """``part`` of the block in terms of the loops."""
        for variable, value in zip(self._realize.block.iter_vars, self._realize.iter_values, strict=True):
            part = _replace(part, variable.var, value)
        return part

    def written_out(self, leaves: Sequence[Any]) -> Any:
        from tvm import s_tir, tirx

        store = self._realize.block.body
        value = store.value
        statements: list[Any] = []
        buffers: list[Any] = []
        for leaf in leaves:
            dtype = str(leaf.ty.dtype)
            rounds = [
                tirx.decl_buffer((self._rows**2,), dtype, f"round{number}", scope="local")
                for number in range(self._rows.bit_length())
            ]
            buffers += rounds
            statements += [self._take(self._placed(leaf), rounds[0], column) for column in range(self._rows)]
            statements += self._turn(rounds)
            turned = rounds[-1]
            value = _exchange(value, leaf, tirx.BufferLoad(turned, [self._row * self._rows + self._column]))
        stores = self._placed(tirx.BufferStore(store.buffer, value, store.indices))
        for row in range(self._rows):
            statements.append(self._vector(self._column, _replace(stores, self._row, self._number(row))))
        block = s_tir.SBlock([], [], [], "transposed", tirx.SeqStmt(statements), alloc_buffers=buffers)
        return s_tir.SBlockRealize([], True, block)

    def _number(self, value: int) -> Any:
        from tvm import tirx

        return tirx.const(value, str(self._row.ty.dtype))

    def _vector(self, variable: Any, body: Any) -> Any:
        from tvm import tirx

        lane = tirx.Var("lane", str(variable.ty.dtype))
        size = tirx.const(self._rows, str(variable.ty.dtype))
        start = tirx.const(0, str(variable.ty.dtype))
        return tirx.For(lane, start, size, tirx.ForKind.VECTORIZED, _replace(body, variable, lane))

    def _take(self, leaf: Any, taken: Any, column: int) -> Any:
        from tvm import tirx

        place = self._number(column * self._rows) + self._row
        value = _replace(leaf, self._column, tirx.const(column, str(self._column.ty.dtype)))
        return self._vector(self._row, tirx.BufferStore(taken, value, [place]))

    def _turn(self, rounds: Sequence[Any]) -> list[Any]:
        from tvm import tirx

        statements = []

        def row_of(number: int) -> list[Any]:
            return [tirx.Ramp(tirx.const(number * self._rows, "int32"), tirx.const(1, "int32"), self._rows)]

        for number, (source, target) in enumerate(itertools.pairwise(rounds), 1):
            distance = self._rows >> number
            for upper in (row for row in range(self._rows) if not row & distance):
                pair = (upper, upper + distance)
                vectors = [tirx.BufferLoad(source, row_of(row)) for row in pair]
                for row, lanes in zip(pair, _lanes(self._rows, distance), strict=True):
                    mixed = tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])
                    statements.append(tirx.BufferStore(target, mixed, row_of(row)))
        return statements


def _lanes(rows: int, distance: int) -> tuple[list[int], list[int]]:
    """Which of the 2 x ``rows`` elements of an upper and a lower row make the new ones."""
    upper = [c if not c & distance else rows + c - distance for c in range(rows)]
    lower = [c + distance if not c & distance else rows + c for c in range(rows)]
    return upper, lower


def _exchange(expression: Any, part: Any, value: Any) -> Any:
    import tvm_ffi
    from tvm import ir

    return tvm_ffi.structural_map(expression, (ir.Expr, lambda node: value if node.same_as(part) else node))
