"""Schedules of products that keep a tile of accumulators in vector registers over the whole reduction.

All share one form: a block ``acc`` computes whole tiles, the block after it takes the values out, with whatever
was fused behind.  A tile is one iteration of the outer loops; inside, the reduction runs around the unrolled
tile, so that each step loads ``vectors`` vectors of weights and ``rows`` values of data once.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    DoesNotFitError,
    blocks_of,
    dividing_lanes,
    extent,
    is_heavy,
    lanes_of,
    mark_of,
    name_of,
    parallel,
    products_of,
    settle,
    spatial,
    split_epilogue,
    work_of,
)

ROWS_AT_RUN_TIME = 32
"""What rows known only at run time count as: a sequence, mostly."""


def anchor_of(schedule: Any, rule: str) -> Any:
    """The only block marked with ``rule``.

    Raises:
        DoesNotFitError: there is none, or several.
    """
    marks = [(block, mark_of(schedule, block, RULE)) for block in blocks_of(schedule)]
    found = [block for block, mark in marks if mark is not None and str(mark) == rule]
    if len(found) != 1:
        raise DoesNotFitError
    return found[0]


def open_product(schedule: Any, rule: str, axes: int) -> tuple[Any, Any, tuple[int, int, int]]:
    """The block marked with ``rule``, the one behind it with all that was fused, and (rows, columns, vectors).

    Raises:
        DoesNotFitError: no such block, or what is behind it has not ``axes`` loops.
    """
    anchor = anchor_of(schedule, rule)
    rows, columns, vectors = (int(mark_of(schedule, anchor, key)) for key in (ROWS, COLUMNS, VECTORS))
    final = split_epilogue(schedule, anchor)
    if len(schedule.get_loops(final)) != axes:
        raise DoesNotFitError
    return anchor, final, (rows, columns, vectors)


def unroll_tile(schedule: Any, loops: list[Any]) -> None:
    """The last loop becomes a vector, the others are unrolled."""
    schedule.vectorize(loops[-1])
    for loop in loops[:-1]:
        schedule.unroll(loop)


def convolution(schedule: Any, machine: Machine) -> None:
    """Rule ``conv``: loops (ic, ky, kx, ii) around (rows, columns, vectors, lanes)."""
    anchor, final, (rows, columns, vectors) = open_product(schedule, "conv", 5)
    loops = schedule.get_loops(final)
    copy = settle(schedule, anchor, final) if is_heavy(schedule, final) else None
    work = products_of(schedule, anchor)
    b, o, y, x, lane = loops
    o_outer, o_inner = schedule.split(o, [None, vectors])
    if _is_broadcast(schedule, anchor, y, x):
        # One pixel, of which all others are made: a gate of channels.
        outer, inner = [b, o_outer], [o_inner, lane]
        schedule.reorder(b, o_outer, y, x, o_inner, lane)
    else:
        y_outer, y_inner = schedule.split(y, [None, rows])
        x_outer, x_inner = schedule.split(x, [None, columns])
        outer, inner = [b, o_outer, y_outer, x_outer], [y_inner, x_inner, o_inner, lane]
        schedule.reorder(*outer, *inner)
    _finish(schedule, copy, outer, inner)
    schedule.compute_at(anchor, outer[-1], preserve_unit_loops=True)
    tile = schedule.get_loops(anchor)[len(outer) :]
    _, o_c, y_c, _, x_c, lane_c, *reduces = tile
    schedule.reorder(*reduces, y_c, x_c, o_c, lane_c)
    unroll_tile(schedule, [y_c, x_c, o_c, lane_c])
    for pad in pads_of(schedule):
        if len(schedule.get_loops(pad)) == 4:
            _pad_plain(schedule, pad, machine)
        else:
            spatial(schedule, pad, machine)
    # Before the split into initialization and update: afterwards two blocks write the same buffer.
    parallel(schedule, outer[:3], work)
    schedule.decompose_reduction(anchor, reduces[0])


def _finish(schedule: Any, copy: Any, outer: list[Any], inner: list[Any]) -> None:
    """Schedules what is done with a tile: unrolled, or, behind ``copy`` (see :func:`settle`), as loops."""
    if copy is None:
        unroll_tile(schedule, inner)
        return
    schedule.vectorize(inner[-1])
    schedule.compute_at(copy, outer[-1], preserve_unit_loops=True)
    unroll_tile(schedule, schedule.get_loops(copy)[len(outer) :])


def _is_broadcast(schedule: Any, anchor: Any, y: Any, x: Any) -> bool:
    """Whether the anchor makes one pixel and the loops ``y`` and ``x`` behind it make several."""
    _, _, height, across, _, _, *_ = schedule.get_loops(anchor)
    one = extent(schedule, height) == extent(schedule, across) == 1
    columns = int(mark_of(schedule, anchor, COLUMNS))
    return one and (extent(schedule, y) != 1 or extent(schedule, x) not in range(1, columns + 1))


def depthwise(schedule: Any, machine: Machine) -> None:
    """Rule ``depthwise``: the filter unrolled over a row of columns, so that neighbours share loads."""
    anchor, final, (_, columns, _) = open_product(schedule, "depthwise", 5)
    loops = schedule.get_loops(final)
    b, c, _, x, lane = loops
    # A depthwise filter reads as much as it multiplies.
    work = work_of(schedule, loops, 1)
    x_outer, x_inner = schedule.split(x, [None, columns])
    schedule.compute_at(anchor, x_outer, preserve_unit_loops=True)
    _, _, _, _, x_c, lane_c, ky, kx = schedule.get_loops(anchor)[4:]
    schedule.reorder(ky, kx, x_c, lane_c)
    schedule.unroll(ky)
    schedule.unroll(kx)
    unroll_tile(schedule, [x_c, lane_c])
    unroll_tile(schedule, [x_inner, lane])
    for pad in pads_of(schedule):
        schedule.compute_at(pad, c, preserve_unit_loops=True)
        schedule.vectorize(schedule.get_loops(pad)[-1])
    parallel(schedule, [b, c], work)
    schedule.decompose_reduction(anchor, ky)


def dense(schedule: Any, machine: Machine) -> None:
    """Rule ``dense``: columns outside, so that a tile's weights stay in cache for all rows."""
    anchor, final, (_, rows, vectors) = open_product(schedule, "dense", 2)
    loops = schedule.get_loops(final)
    copy = settle(schedule, anchor, final) if is_heavy(schedule, final) else None
    m, n = loops
    work = products_of(schedule, anchor, max(1, ROWS_AT_RUN_TIME // rows))
    width = int(schedule.get(schedule.get_loops(anchor)[3]).extent)
    n_outer, n_inner, lane = schedule.split(n, [None, vectors, width])
    m_outer, m_inner = schedule.split(m, [None, rows])
    schedule.reorder(n_outer, m_outer, m_inner, n_inner, lane)
    _finish(schedule, copy, [n_outer, m_outer], [m_inner, n_inner, lane])
    schedule.compute_at(anchor, m_outer, preserve_unit_loops=True)
    o_c, _, m_c, lane_c, k = schedule.get_loops(anchor)[2:]
    schedule.reorder(k, m_c, o_c, lane_c)
    unroll_tile(schedule, [m_c, o_c, lane_c])
    parallel(schedule, [n_outer, m_outer], work)
    schedule.decompose_reduction(anchor, k)


def pads_of(schedule: Any) -> list[Any]:
    """The blocks that pad images."""
    return [block for block in blocks_of(schedule) if name_of(schedule, block).startswith("pad")]


def _pad_plain(schedule: Any, pad: Any, machine: Machine) -> None:
    """Zeros first, then the image over them: a condition on the column would keep its loop from becoming vectors."""
    b, c, y, _ = schedule.get_loops(pad)
    work = work_of(schedule, schedule.get_loops(pad), 1)
    fill = schedule.decompose_padding(pad, y)
    for block in (fill, pad):
        *_, last = schedule.get_loops(block)
        lanes = dividing_lanes(extent(schedule, last), lanes_of(schedule, block, machine))
        if lanes:
            _, lane = schedule.split(last, [None, lanes])
            schedule.vectorize(lane)
    parallel(schedule, [b, c], work)
