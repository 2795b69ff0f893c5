"""Matrix products of two computed operands, (..., m, k) and (..., k, n), neither of them packed."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    DoesNotFitError,
    blocks_of,
    divisor,
    extent,
    is_reduction,
    kinds,
    lanes_of,
    name_of,
    parallel,
    split_epilogue,
    walks_lanes,
)

_RESERVED = 4
"""Vector registers kept free of accumulators, for operands."""


def matmul(schedule: Any, machine: Machine) -> None:
    """Tile of rows x vectors of columns; the reduction runs around it."""
    anchors = [b for b in blocks_of(schedule) if "matmul" in name_of(schedule, b) and is_reduction(schedule, b)]
    if len(anchors) != 1:
        raise DoesNotFitError
    anchor = anchors[0]
    of_kind = kinds(schedule, anchor)
    if of_kind[-1] != 2 or 2 in of_kind[:-1] or len(of_kind) < 3:
        raise DoesNotFitError
    if not walks_lanes(schedule, anchor, len(of_kind) - 2):
        raise DoesNotFitError
    final = split_epilogue(schedule, anchor)
    loops = schedule.get_loops(final)
    if len(loops) != len(of_kind) - 1:
        raise DoesNotFitError
    *outer, m, n = loops
    columns, rows = extent(schedule, n), extent(schedule, m)
    lanes = lanes_of(schedule, anchor, machine)
    while lanes >= 4 and (columns == 0 or columns % lanes):
        lanes //= 2
    if lanes < 4:
        raise DoesNotFitError
    vectors = divisor(columns // lanes, 4)
    tile_rows = divisor(rows, max(1, (machine.registers - _RESERVED) // vectors)) if rows else 1
    n_outer, n_inner, lane = schedule.split(n, [None, vectors, lanes])
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    schedule.reorder(*outer, m_outer, n_outer, m_inner, n_inner, lane)
    schedule.compute_at(anchor, n_outer, preserve_unit_loops=True)
    *units, m_c, n_c, k = schedule.get_loops(anchor)[len(outer) + 2 :]
    v_c, lane_c = schedule.split(n_c, [None, lanes])
    schedule.reorder(k, *units, m_c, v_c, lane_c)
    for tile in ([m_c, v_c, lane_c], [m_inner, n_inner, lane]):
        schedule.vectorize(tile[-1])
        for loop in tile[:-1]:
            schedule.unroll(loop)
    work = rows * columns * extent(schedule, k)
    parallel(schedule, [*outer, m_outer, n_outer], 0 if outer else work)
    schedule.decompose_reduction(anchor, k)
