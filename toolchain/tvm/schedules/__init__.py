"""CPU schedules by fixed rules: no tuning, so the same module always gives the same code.

:data:`RULES` is tried in order; a rule that doesn't fit a loop nest leaves it to the next, and a nest that not
even the generic rule fits stays as it is and is noted by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import Machine
from toolchain.tvm.schedules import attention, few, generic, int8, matmul, rows, tiled, winograd
from toolchain.tvm.schedules.common import DoesNotFitError
from toolchain.tvm.schedules.explain import explain

if TYPE_CHECKING:
    from toolchain.tvm.pipeline import Notes

RULES: tuple[tuple[str, Callable[[Any, Machine], None]], ...] = (
    ("convolution", tiled.convolution),
    ("depthwise", tiled.depthwise),
    ("few channels", few.convolution),
    ("dense", tiled.dense),
    ("convolution int8", int8.convolution),
    ("dense int8", int8.dense),
    ("winograd input", winograd.transform_input),
    ("winograd product", winograd.product),
    ("winograd output", winograd.transform_output),
    ("attention", attention.attention),
    ("rows", rows.rows),
    ("product", matmul.product),
    ("matmul", matmul.matmul),
    ("generic", generic.generic),
)


def schedule_pass(machine: Machine, notes: Notes) -> Any:
    """A module pass that schedules every loop nest and adds the names of those it could not to ``notes``."""
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="toolchain.schedule_cpu")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        scheduled = {}
        for variable, function in module.functions_items():
            if not isinstance(function, tvm.tirx.PrimFunc):
                continue
            rule, body = schedule_function(function, machine)
            notes.rules[variable.name_hint] = rule
            notes.kernels[variable.name_hint] = explain(function, rule, machine)
            if body is None:
                notes.unscheduled.append(variable.name_hint)
            else:
                scheduled[variable] = body.with_attrs({**dict(function.attrs), "tirx.is_scheduled": True})
        notes.unscheduled.sort()
        module = module.clone()
        for variable, body in scheduled.items():
            module.update_func(variable, body)
        return module

    return apply


def schedule_function(function: Any, machine: Machine) -> tuple[str, Any]:
    """The rule that fits ``function`` and what it makes of it; ``("", None)`` if none does."""
    tvm = load_tvm()
    from tvm import s_tir

    schedule: Any = None
    for name, rule in RULES:
        # Most rules look at the function and leave it alone; only one that changed it needs a fresh start.
        if schedule is None or not schedule.mod["main"].same_as(function):
            schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
        try:
            rule(schedule, machine)
        except (DoesNotFitError, RuntimeError, ValueError):
            continue
        return name, schedule.mod["main"]
    return "", None
