"""Matrix products of two computed operands, (..., m, k) and (..., k, n)."""

from __future__ import annotations

import math
from typing import Any

from toolchain.tvm.loops import COLUMNS, VECTORS
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    DoesNotFitError,
    blocks_of,
    divisor,
    extent,
    is_reduction,
    kinds,
    lanes_of,
    mark_of,
    name_of,
    parallel,
    products_of,
    split_epilogue,
    walks_lanes,
)
from toolchain.tvm.schedules.rows import is_padded
from toolchain.tvm.schedules.tails import GUARD
from toolchain.tvm.schedules.tiled import anchor_of

_MANY = 64
"""Iterations assumed of a loop whose number of them is known only at run time."""

_MACS_PER_ELEMENT = 32
"""Multiply-adds of a tiled product that take about as long as one element of a loop over memory."""

_RESERVED = 4
"""Vector registers kept free of accumulators, for operands."""


def product(schedule: Any, machine: Machine) -> None:
    """Rule ``product``: a panel of columns packed, then a tile of rows after the other; panels in parallel."""
    anchor = anchor_of(schedule, "product")
    packs = [block for block in blocks_of(schedule) if name_of(schedule, block) == "packed_columns"]
    rows, vectors = (int(mark_of(schedule, anchor, key)) for key in (COLUMNS, VECTORS))
    after = blocks_of(schedule)[[name_of(schedule, b) for b in blocks_of(schedule)].index("acc") + 1 :]
    if len(packs) != 1 or any(is_reduction(schedule, block) for block in after):
        raise DoesNotFitError
    for block in after[:-1]:
        schedule.compute_inline(block)
    loops = schedule.get_loops(after[-1])
    if len(loops) != len(kinds(schedule, anchor)) - 3:
        raise DoesNotFitError
    work = math.prod(extent(schedule, loop) or _MANY for loop in schedule.get_loops(anchor)) // _MACS_PER_ELEMENT
    *outer, m, n = loops
    lanes = machine.lanes(str(schedule.get(anchor).writes[0].source.ty.dtype))
    columns = extent(schedule, n)
    n_outer, n_inner, lane = schedule.split(n, [None, vectors, lanes])
    m_outer, m_inner = schedule.split(m, [None, rows])
    schedule.reorder(*outer, n_outer, m_outer, m_inner, n_inner, lane)
    schedule.compute_at(anchor, m_outer, preserve_unit_loops=True)
    schedule.compute_at(packs[0], n_outer, preserve_unit_loops=True)
    schedule.set_scope(anchor, 0, "local")
    parallel(schedule, [*outer, n_outer], work)
    *_, row, width, k = schedule.get_loops(anchor)
    vector, lane_c = schedule.split(width, [None, lanes])
    schedule.reorder(k, row, vector, lane_c)
    for loop in (row, vector):
        schedule.unroll(loop)
    schedule.vectorize(lane_c)
    schedule.vectorize(lane)
    if columns == 0 or columns % (vectors * lanes):
        schedule.annotate(n_inner, GUARD, lanes)
    _vectorize_pack(schedule, packs[0], lanes)
    schedule.decompose_reduction(anchor, k)


def _vectorize_pack(schedule: Any, block: Any, lanes: int) -> None:
    *_, pack = schedule.get_loops(block)
    if is_padded(schedule, block):
        outer, lane = schedule.split(pack, [None, lanes])
        schedule.vectorize(lane)
        schedule.annotate(outer, GUARD, lanes)
    else:
        schedule.vectorize(pack)


def matmul(schedule: Any, machine: Machine) -> None:
    """Neither operand packed: tile of rows x vectors of columns; the reduction runs around it."""
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
    work = products_of(schedule, anchor, 32)
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
    parallel(schedule, [*outer, m_outer, n_outer], work)
    schedule.decompose_reduction(anchor, k)
