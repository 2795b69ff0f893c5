"""The two forms of an engine that TVM compiled, and which of them a model gets.

*Ahead of time* ("aot"): a plan in C, with no run-time.  *Virtual machine* ("vm"): TVM's run-time executes the
Relax function; it serves what a plan can't, such as sizes that depend on values, and CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.tvm.aot.library import AheadOfTime, compile_ahead, link_ahead
from toolchain.tvm.aot.sizes import PlanError
from toolchain.tvm.library import Refusal, load_tvm
from toolchain.tvm.link import link_executable
from toolchain.tvm.pipeline import Notes, compile_prepared, dump_module, prepare_module

if TYPE_CHECKING:
    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine

OWN_FUNCTIONS = ("relax.run.nonzero", "relax.run.shape_to_tensor")
"""Of the functions that TVM has in Python alone, those that our runtimes bring (``runtime/tvm_functions.py``)."""
FORMS = ("auto", "aot", "vm", "static")


@dataclass(frozen=True, slots=True)
class Interface:
    """What a plan must know of a model: names of inputs and outputs in order, and the dimensions' ranges."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    limits: Mapping[str, tuple[int, int | None]]


@dataclass(frozen=True, slots=True)
class Form:
    """What was built.

    Attributes:
        name: ``"aot"`` or ``"vm"``.
        because: why it is the virtual machine's, when a plan was wanted.
        arena_bytes: of a plan at static sizes; None otherwise.
        weight_bytes: of a plan's constants.
        engine: what a plan's library was linked from.
    """

    name: str
    because: str = ""
    arena_bytes: int | None = None
    weight_bytes: int | None = None
    engine: AheadOfTime | None = None


def called_in_python(module: Any) -> list[str]:
    """Functions that ``module`` calls and that TVM has in Python alone, which no engine can bring along."""
    relax = load_tvm().relax
    found: set[str] = set()

    def look(expression: Any) -> None:
        name = str(getattr(expression, "global_symbol", "")) if isinstance(expression, relax.ExternFunc) else ""
        if name.startswith("relax.run.") and name not in OWN_FUNCTIONS:
            found.add(name)

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, look)
    return sorted(found)


def build_library(
    module: Any,
    machine: Machine,
    notes: Notes,
    linker: Linker,
    output: Path,
    interface: Interface,
    form: str,
    dump: Path | None = None,
) -> Form:
    """Compiles an imported module to the library ``output``, in the form wanted.

    Args:
        module: from the importer; not changed.
        machine: the target.
        notes: filled in.
        linker: for the target.
        output: file to write.
        interface: of the model.
        form: ``"auto"`` (ahead of time where that can be), ``"aot"`` or ``"vm"``; ``"static"`` is built as ``"aot"``,
            and linked to an executable later.
        dump: folder for the IR after each phase and for the plan, or None.

    Raises:
        Refusal: it can't be compiled, or not in this form.
        ToolchainError: MISSING_TOOL, COMPILE or BAD_TARGET.
    """
    prepared = prepare_module(module, machine, notes, dump)
    because = ""
    if form != "vm" and machine.kind == "cpu":
        try:
            engine = compile_ahead(prepared.module, machine, interface.inputs, interface.outputs, interface.limits)
        except PlanError as error:
            because = f"a plan ahead of time can't hold the model: {error}"
        else:
            dump_module(dump, prepared.number + 1, "codegen", engine.lowered)
            if dump is not None:
                (dump / f"{prepared.number + 2:02d}-plan.c").write_text(engine.plan)
            link_ahead(engine, linker, output)
            return Form("aot", "", engine.arena_bytes, engine.weight_bytes, engine)
    if form in ("aot", "static"):
        raise Refusal(because or f"engines ahead of time are for CPUs, not for {machine.kind}")
    if foreign := called_in_python(prepared.module):
        raise Refusal(f"TVM computes it in Python: {', '.join(foreign)}")
    link_executable(compile_prepared(prepared, machine, notes, dump), linker, output)
    return Form("vm", because)
