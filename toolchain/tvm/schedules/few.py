"""The schedule of convolutions with few output channels (:mod:`toolchain.tvm.loops.few`)."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.loops import COLUMNS
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import DoesNotFitError, blocks_of, mark_of, name_of, parallel, products_of, spatial
from toolchain.tvm.schedules.tiled import anchor_of, pads_of, unroll_tile


def convolution(schedule: Any, machine: Machine) -> None:
    """Rule ``few``: a tile is all output channels of some columns of a row; then halvings, then what was fused."""
    anchor = anchor_of(schedule, "few")
    columns = int(mark_of(schedule, anchor, COLUMNS))
    work = products_of(schedule, anchor)
    blocks = blocks_of(schedule)
    place = [name_of(schedule, b) for b in blocks].index(name_of(schedule, anchor))
    for block in blocks[:place]:
        if not name_of(schedule, block).startswith("pad"):
            schedule.compute_inline(block)
    halvings = [b for b in blocks[place + 1 :] if name_of(schedule, b).startswith("sum")]
    *between, final = blocks[place + 1 + len(halvings) :]
    for block in between:
        schedule.compute_inline(block)
    if len(schedule.get_loops(final)) != 4:
        raise DoesNotFitError
    b, o, y, x = schedule.get_loops(final)
    x_outer, x_inner = schedule.split(x, [None, columns])
    schedule.reorder(b, y, x_outer, o, x_inner)
    schedule.unroll(o)
    schedule.unroll(x_inner)
    for block in reversed([anchor, *halvings]):
        schedule.compute_at(block, x_outer, preserve_unit_loops=True)
        schedule.set_scope(block, 0, "local")
    for block in halvings:
        unroll_tile(schedule, schedule.get_loops(block)[3:])
    _, o_c, _, _, x_c, lane, *reduces = schedule.get_loops(anchor)[3:]
    schedule.reorder(*reduces, o_c, x_c, lane)
    unroll_tile(schedule, [o_c, x_c, lane])
    for pad in pads_of(schedule):
        spatial(schedule, pad, machine)
    parallel(schedule, [b, y], work)
    schedule.decompose_reduction(anchor, reduces[0])
