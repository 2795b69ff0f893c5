"""Rule ``attention``: a head at a time in parallel, then blocks of query rows with all their stages."""

from __future__ import annotations

import math
from typing import Any

from toolchain.tvm.loops import COLUMNS, VECTORS
from toolchain.tvm.loops.rows import STAGE
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import blocks_of, extent, mark_of, name_of, parallel
from toolchain.tvm.schedules.rows import is_padded, keep_local, vectorize_ragged, vectorize_stage
from toolchain.tvm.schedules.tails import TAIL
from toolchain.tvm.schedules.tiled import anchor_of

_MANY = 64
"""Iterations assumed of a loop whose number of them is known only at run time."""

_MACS_PER_ELEMENT = 32
"""Multiply-adds of a tiled product that take about as long as one element of a loop over memory."""


def attention(schedule: Any, machine: Machine) -> None:
    """Loops (b, h) in parallel, keys packed there; then blocks of rows."""
    last = anchor_of(schedule, "attention")
    lanes = machine.lanes("float32")
    rows = int(mark_of(schedule, last, COLUMNS))
    b, s, h, d = schedule.get_loops(last)
    work = _work(schedule, last)
    s_outer, s_inner = schedule.split(s, [None, rows])
    schedule.reorder(b, h, s_outer, s_inner, d)
    stages = [(str(mark_of(schedule, block, STAGE)), block) for block in blocks_of(schedule)[:-1]]
    (scores,) = (block for kind, block in stages if kind == "scores")
    for kind, block in reversed(stages):
        where = h if kind == "pack" else s_outer
        if kind == "products":
            where = _score_tiles(schedule, scores)
        elif kind in ("dots", "halves"):
            where = schedule.get_loops(scores)[-1]
        schedule.compute_at(block, where, preserve_unit_loops=True)
        keep_local(schedule, block)
    parallel(schedule, [b, h], work)
    for kind, block in stages:
        if kind in ("reduce", "fold", "dots", "halves"):
            vectorize_stage(schedule, block)
        elif kind == "powers":
            schedule.vectorize(schedule.get_loops(block)[-1])
        elif kind in ("pack", "mask"):
            _filled(schedule, block)
        elif kind == "products":
            _products(schedule, block, lanes)
        elif kind == "weighted":
            _weighted(schedule, block)
    vectorize_ragged(schedule, d, lanes)


def _work(schedule: Any, last: Any) -> int:
    """Elements of the scores, each with the multiply-adds of a head's depth on both sides."""
    (product,) = (block for block in blocks_of(schedule) if name_of(schedule, block) == "weighted")
    iterations = math.prod(extent(schedule, loop) or _MANY for loop in schedule.get_loops(product))
    depth = extent(schedule, schedule.get_loops(last)[-1])
    return iterations // depth * (1 + 2 * depth // _MACS_PER_ELEMENT)


def _filled(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    schedule.vectorize(loops[-1])
    if is_padded(schedule, block):
        # Keys are filled up along their tiles, the axis before the depth; values and masks along the last but one.
        where = loops[-3] if "keys" in name_of(schedule, block) else loops[-2]
        schedule.annotate(where, TAIL, extent(schedule, loops[-1]))


def _score_tiles(schedule: Any, scores: Any) -> Any:
    """The loop over tiles of keys, around that over rows."""
    *_, r, t, w = schedule.get_loops(scores)
    schedule.reorder(t, r, w)
    schedule.unroll(r)
    schedule.vectorize(w)
    return t


def _products(schedule: Any, products: Any, lanes: int) -> None:
    """A tile of rows x vectors of keys in registers over the whole depth."""
    *_, r, _, w, d = schedule.get_loops(products)
    v, lane = schedule.split(w, [None, lanes])
    schedule.reorder(d, r, v, lane)
    _unroll(schedule, [r, v, lane])
    schedule.decompose_reduction(products, d)


def _weighted(schedule: Any, block: Any) -> None:
    """A tile of rows x vectors of the result in registers over all keys."""
    *_, r, v, lane, t = schedule.get_loops(block)
    v_outer, v_inner = schedule.split(v, [None, int(mark_of(schedule, block, VECTORS))])
    schedule.reorder(v_outer, t, r, v_inner, lane)
    _unroll(schedule, [r, v_inner, lane])
    schedule.decompose_reduction(block, t)


def _unroll(schedule: Any, loops: list[Any]) -> None:
    schedule.vectorize(loops[-1])
    for loop in loops[:-1]:
        schedule.unroll(loop)
