"""What a rule decided for a loop nest and what the model of :mod:`toolchain.tvm.tiles` expects of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from toolchain.tvm.library import load_tvm
from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.machine import Machine, dtype_bits
from toolchain.tvm.schedules.common import blocks_of, mark_of
from toolchain.tvm.tiles import Room

_PRODUCTS = frozenset({"conv", "dense", "winograd_product"})
"""Marks of loop nests that the model of tiles describes."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One loop nest.

    Attributes:
        rule: the rule that scheduled it; "" for none.
        tile: ``rows x columns x vectors of lanes``, or "" where there is no register tile.
        of_peak: expected share of the core's multiply-add peak, edges included; None where the model has none.
            Sizes known only at run time count as without ragged edges.
    """

    rule: str
    tile: str = ""
    of_peak: float | None = None


def explain(function: Any, rule: str, machine: Machine) -> Explanation:
    """Explains ``function``, not yet scheduled, for which ``rule`` was taken."""
    if not rule:
        return Explanation("")
    tvm = load_tvm()
    from tvm import s_tir

    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    for block in blocks_of(schedule):
        mark = mark_of(schedule, block, RULE)
        if mark is not None and mark_of(schedule, block, VECTORS) is not None:
            return _tiled(schedule, block, str(mark), rule, machine)
    return Explanation(rule)


def _tiled(schedule: Any, anchor: Any, mark: str, rule: str, machine: Machine) -> Explanation:
    rows, columns, vectors = (int(mark_of(schedule, anchor, key)) for key in (ROWS, COLUMNS, VECTORS))
    body = schedule.get(anchor)
    sizes = [_size(variable.dom.extent) for variable in body.iter_vars]
    kinds = [int(variable.iter_type) for variable in body.iter_vars]
    *_, lanes = (size for size, kind in zip(sizes, kinds, strict=True) if kind == 0)
    tile = f"{rows}x{columns} x {vectors}x{lanes}"
    if mark not in _PRODUCTS:
        return Explanation(rule, tile)
    depth = 1
    for size, kind in zip(sizes, kinds, strict=True):
        depth *= size if kind == 2 else 1
    dtype = str(body.writes[0].source.dtype)
    room = Room(machine.registers, machine.l1d_kib * 1024, depth * lanes * dtype_bits(dtype) // 8)
    share = rows * columns * vectors / int(room.step(rows * columns, vectors))
    return Explanation(rule, tile, round(share * _covered(schedule, anchor), 2))


def _covered(schedule: Any, anchor: Any) -> float:
    """Share of the accumulators that are values of the output, as far as sizes are known."""
    counts = []
    for block in (schedule.get_consumers(anchor)[0], anchor):
        shape = schedule.get(block).writes[0].source.shape
        if not all(isinstance(size, int) or hasattr(size, "value") for size in shape):
            return 1.0
        counts.append(math.prod(int(size) for size in shape))
    return min(1.0, counts[0] / counts[1])


def _size(extent: Any) -> int:
    return int(extent) if isinstance(extent, int) or hasattr(extent, "value") else 1
