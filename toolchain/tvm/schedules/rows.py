"""Rule ``rows``: every stage of a row kernel at one loop over rows, which runs in parallel; vectors inside."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.loops.rows import ROW_TILE, STAGE
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    DoesNotFitError,
    blocks_of,
    extent,
    is_reduction,
    kinds,
    mark_of,
    name_of,
    parallel,
    work_of,
)
from toolchain.tvm.schedules.tails import IF, TAIL, operator_name
from toolchain.tvm.schedules.tiled import anchor_of


def rows(schedule: Any, machine: Machine) -> None:
    """Stages are computed where the last one stores a tile of rows."""
    last = anchor_of(schedule, "rows")
    tile = int(mark_of(schedule, last, ROW_TILE))
    names = [name_of(schedule, block) for block in blocks_of(schedule)]
    place = names.index(name_of(schedule, last))
    stages = [b for b in blocks_of(schedule)[:place] if mark_of(schedule, b, STAGE) is not None]
    producers = [b for b in blocks_of(schedule)[:place] if mark_of(schedule, b, STAGE) is None]
    axes = len(kinds(schedule, last))
    final = _inline_outside(schedule, producers, last, blocks_of(schedule)[place + 1 :])
    loops = schedule.get_loops(final)
    if len(loops) != axes:
        raise DoesNotFitError
    depth = len(kinds(schedule, stages[-1])) - 2
    work = work_of(schedule, loops) * (1 if len(loops) > depth + 1 else 64)
    if not producers and not is_padded(schedule, stages[0]):
        schedule.compute_inline(stages.pop(0))
    m_outer, _ = schedule.split(loops[depth], [None, tile])
    for stage in reversed(stages):
        schedule.compute_at(stage, m_outer, preserve_unit_loops=True)
        keep_local(schedule, stage)
    if len(loops) > depth + 1:
        vectorize_ragged(schedule, loops[depth + 1], machine.lanes("float32"))
    # Before the splits into initialization and update: afterwards two blocks write the same buffer.
    parallel(schedule, [*loops[:depth], m_outer], work)
    for stage in stages:
        vectorize_stage(schedule, stage)


def _inline_outside(schedule: Any, producers: list[Any], last: Any, after: list[Any]) -> Any:
    """Element-wise work before the first stage and after the last one into them; the last block."""
    if any(is_reduction(schedule, block) for block in [*producers, *after]):
        raise DoesNotFitError
    for block in producers:
        schedule.compute_inline(block)
    for block in [last, *after][:-1]:
        schedule.compute_inline(block)
    return after[-1] if after else last


def is_padded(schedule: Any, block: Any) -> bool:
    """Whether the block fills up what it reads."""
    return operator_name(schedule.get(block).body.value) == IF


def keep_local(schedule: Any, stage: Any) -> None:
    """Buffers of known size into registers or onto the stack."""
    shape = schedule.get(stage).writes[0].source.ty.shape
    small = str(mark_of(schedule, stage, STAGE)) in ("reduce", "fold", "row", "products", "dots", "halves")
    if small or all(hasattr(size, "value") for size in list(shape)[-3:]):
        schedule.set_scope(stage, 0, "local")


def vectorize_stage(schedule: Any, stage: Any) -> None:
    """The lanes of one stage, computed already where it belongs."""
    kind = str(mark_of(schedule, stage, STAGE))
    loops = schedule.get_loops(stage)
    if kind in ("reduce", "dots"):
        *_, lane, step = loops
        schedule.reorder(step, lane)
        schedule.vectorize(lane)
        schedule.decompose_reduction(stage, step)
    elif kind in ("chunks", "fold", "halves", "load"):
        if extent(schedule, loops[-1]) > 1:
            schedule.vectorize(loops[-1])
        if kind == "load" and is_padded(schedule, stage):
            schedule.annotate(loops[-2], TAIL, extent(schedule, loops[-1]))


def vectorize_ragged(schedule: Any, loop: Any, lanes: int) -> None:
    """Whole vectors of a loop, then what is left of it, element by element."""
    size = extent(schedule, loop)
    outer, lane = schedule.split(loop, [None, lanes])
    schedule.vectorize(lane)
    if size % lanes or not size:
        schedule.annotate(outer, TAIL, lanes)
