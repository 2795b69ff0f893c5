"""Schedules of 8-bit products: the tiles of :mod:`toolchain.tvm.schedules.tiled`, with four products a lane inside."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.intrinsics import DOT, OCTET, QUAD
from toolchain.tvm.loops.conv_int8 import PAIRS
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    extent,
    mark_of,
    parallel,
    products_of,
    work_of,
)
from toolchain.tvm.schedules.tiled import ROWS_AT_RUN_TIME, open_product, pads_of, unroll_tile


def convolution(schedule: Any, machine: Machine) -> None:
    """Rule ``conv_int8``: loops (ic, ky, kx, part) around (rows, columns, vectors), lanes and four values inside."""
    anchor, final, (rows, columns, vectors) = open_product(schedule, "conv_int8", 5)
    work = products_of(schedule, anchor) // 2
    b, o, y, x, lane = schedule.get_loops(final)
    o_outer, o_inner = schedule.split(o, [None, vectors])
    y_outer, y_inner = schedule.split(y, [None, rows])
    x_outer, x_inner = schedule.split(x, [None, columns])
    outer, inner = [b, o_outer, y_outer, x_outer], [y_inner, x_inner, o_inner, lane]
    schedule.reorder(*outer, *inner)
    schedule.compute_at(anchor, outer[-1], preserve_unit_loops=True)
    _, o_c, y_c, _, x_c, lane_c, *reduces, k = schedule.get_loops(anchor)[len(outer) :]
    schedule.reorder(*reduces, y_c, x_c, o_c, lane_c, k)
    unroll_tile(schedule, inner)
    for pad in pads_of(schedule):
        pad_rows(schedule, pad)
    parallel(schedule, outer[:-1], work)
    _finish(schedule, anchor, reduces[0], [y_c, x_c, o_c, lane_c, k])


def pad_rows(schedule: Any, block: Any) -> None:
    """Rows in parallel; a row's edges apart from its middle, which is then copied without conditions.

    TVM can't take apart a row whose length is known only at run time.
    """
    *outer, x, lane = schedule.get_loops(block)
    work = work_of(schedule, schedule.get_loops(block))
    if extent(schedule, x):
        schedule.annotate(x, "pragma_loop_partition_hint", True)
    schedule.vectorize(lane)
    parallel(schedule, outer, work)


def dense(schedule: Any, machine: Machine) -> None:
    """Rule ``dense_int8``: columns outside, so that a tile's weights stay in cache for all rows."""
    anchor, final, (_, rows, vectors) = open_product(schedule, "dense_int8", 2)
    m, n = schedule.get_loops(final)
    work = products_of(schedule, anchor, max(1, ROWS_AT_RUN_TIME // rows)) // 2
    width = extent(schedule, schedule.get_loops(anchor)[3])
    n_outer, n_inner, lane = schedule.split(n, [None, vectors, width])
    m_outer, m_inner = schedule.split(m, [None, rows])
    schedule.reorder(n_outer, m_outer, m_inner, n_inner, lane)
    schedule.compute_at(anchor, m_outer, preserve_unit_loops=True)
    o_c, _, m_c, lane_c, part, k = schedule.get_loops(anchor)[2:]
    schedule.reorder(part, m_c, o_c, lane_c, k)
    unroll_tile(schedule, [m_inner, n_inner, lane])
    parallel(schedule, [n_outer, m_outer], work)
    _finish(schedule, anchor, part, [m_c, o_c, lane_c, k])


def _finish(schedule: Any, anchor: Any, reduction: Any, tile: list[Any]) -> None:
    """Unrolls the tile; one vector instruction an accumulator where there are four or eight values a lane."""
    *around, lane, k = tile
    pairs, quads = int(mark_of(schedule, anchor, PAIRS)), extent(schedule, k) in (QUAD, OCTET)
    for loop in around:
        schedule.unroll(loop)
    if not quads:
        # Before the split into initialization and update: afterwards two blocks write the same buffer.
        schedule.reorder(k, lane)
        schedule.vectorize(lane)
    start = schedule.decompose_reduction(anchor, reduction)
    if quads:
        schedule.vectorize(schedule.get_loops(start)[-1])
        schedule.annotate(lane, DOT, pairs)
