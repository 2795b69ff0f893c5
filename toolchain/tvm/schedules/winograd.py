"""Schedules of the three loop nests of :mod:`toolchain.tvm.loops.winograd`."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.loops import COLUMNS, VECTORS
from toolchain.tvm.loops.winograd import OUT, POINTS
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    PARALLEL_MIN,
    DoesNotFitError,
    blocks_of,
    mark_of,
    name_of,
    parallel,
    split_epilogue,
)
from toolchain.tvm.schedules.tiled import anchor_of, unroll_tile


def _named(schedule: Any, name: str) -> Any:
    found = [block for block in blocks_of(schedule) if name_of(schedule, block) == name]
    if len(found) != 1:
        raise DoesNotFitError
    return found[0]


def transform_input(schedule: Any, _machine: Machine) -> None:
    """A tile of one block of channels an iteration, all of its transforms unrolled in registers."""
    anchor_of(schedule, "winograd_input")
    loaded, rows, both = (_named(schedule, name) for name in ("loaded", "rows", "both"))
    final = _named(schedule, "gather")
    p, t, c = schedule.get_loops(final)
    lanes = int(schedule.get(schedule.get_loops(both)[-1]).extent)
    c_outer, lane = schedule.split(c, [None, lanes])
    schedule.reorder(t, c_outer, p, lane)
    p_row, p_column = schedule.split(p, [POINTS, POINTS])
    for block in (both, rows, loaded):
        schedule.compute_at(block, c_outer, preserve_unit_loops=True)
        schedule.set_scope(block, 0, "local")
        unroll_tile(schedule, schedule.get_loops(block)[2:])
    unroll_tile(schedule, [p_row, p_column, lane])
    parallel(schedule, [t, c_outer], PARALLEL_MIN)


def product(schedule: Any, _machine: Machine) -> None:
    """As the rule ``dense``, once a point."""
    anchor = anchor_of(schedule, "winograd_product")
    columns, vectors = (int(mark_of(schedule, anchor, key)) for key in (COLUMNS, VECTORS))
    final = split_epilogue(schedule, anchor)
    p, o, t, lane = schedule.get_loops(final)
    o_outer, o_inner = schedule.split(o, [None, vectors])
    t_outer, t_inner = schedule.split(t, [None, columns])
    schedule.reorder(p, o_outer, t_outer, t_inner, o_inner, lane)
    schedule.compute_at(anchor, t_outer, preserve_unit_loops=True)
    _, o_c, _, t_c, lane_c, k = schedule.get_loops(anchor)[3:]
    schedule.reorder(k, t_c, o_c, lane_c)
    unroll_tile(schedule, [t_c, o_c, lane_c])
    unroll_tile(schedule, [t_inner, o_inner, lane])
    parallel(schedule, [p, o_outer], PARALLEL_MIN)
    schedule.decompose_reduction(anchor, k)


def transform_output(schedule: Any, _machine: Machine) -> None:
    """A tile of one block of channels an iteration; what was fused behind works on the 4x4 values in registers."""
    both = anchor_of(schedule, "winograd_output")
    rows = _named(schedule, "rows")
    blocks = blocks_of(schedule)
    for block in blocks[blocks_index(schedule, both) + 1 : -1]:
        schedule.compute_inline(block)
    final = blocks_of(schedule)[-1]
    loops = schedule.get_loops(final)
    if len(loops) != 5:
        raise DoesNotFitError
    b, o, y, x, lane = loops
    y_outer, y_inner = schedule.split(y, [None, OUT])
    x_outer, x_inner = schedule.split(x, [None, OUT])
    schedule.reorder(b, o, y_outer, x_outer, y_inner, x_inner, lane)
    for block in (both, rows):
        schedule.compute_at(block, x_outer, preserve_unit_loops=True)
        schedule.set_scope(block, 0, "local")
        unroll_tile(schedule, schedule.get_loops(block)[4:])
    unroll_tile(schedule, [y_inner, x_inner, lane])
    parallel(schedule, [b, o, y_outer], PARALLEL_MIN)


def blocks_index(schedule: Any, block: Any) -> int:
    """The place of ``block`` among all."""
    return [name_of(schedule, b) for b in blocks_of(schedule)].index(name_of(schedule, block))
