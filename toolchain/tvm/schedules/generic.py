"""The rules for loop nests that no other rule was made for."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules.common import (
    DoesNotFitError,
    blocks_of,
    is_reduction,
    kinds,
    name_of,
    reduction,
    spatial,
)
from toolchain.tvm.schedules.transposed import transposed


def generic(schedule: Any, machine: Machine) -> None:
    """Every block on its own: parallel outside, vectors inside."""
    if not blocks_of(schedule):
        raise DoesNotFitError
    for block in blocks_of(schedule)[:-1]:
        consumers = schedule.get_consumers(block)
        if is_reduction(schedule, block) or len(consumers) != 1 or is_reduction(schedule, consumers[0]):
            continue
        if "pad" not in name_of(schedule, block):
            schedule.compute_inline(block)
    for block in blocks_of(schedule):
        if not schedule.get_loops(block):
            continue  # a single value
        of_kind = kinds(schedule, block)
        if len(of_kind) != len(schedule.get_loops(block)) or not set(of_kind) <= {0, 2}:
            raise DoesNotFitError
        if 2 in of_kind:
            reduction(schedule, block, machine)
        elif of_kind and not transposed(schedule, block, machine):
            spatial(schedule, block, machine)
