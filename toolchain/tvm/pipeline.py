"""The compile pipeline: one ordered list of phases in numbered groups, and the IR after each on request.

Groups: import; canonicalize; fold; simplify; layout; legalize; fuse; schedule; plan (memory); lower; codegen;
link.  The first is :mod:`toolchain.tvm.importer`, the last :mod:`toolchain.tvm.link`; the others are
:data:`PHASES` and :func:`compile_prepared`.  After each, ``--dump-ir`` gets ``<NN>-<phase>.py``: the module as
TVMScript, large constants left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.tvm import cuda
from toolchain.tvm.intrinsics import dot_products
from toolchain.tvm.library import Refusal, load_tvm, one_line
from toolchain.tvm.lookups import vector_lookups
from toolchain.tvm.machine import Machine as Machine
from toolchain.tvm.nan_order import nan_order
from toolchain.tvm.stack import stack_locals

if TYPE_CHECKING:
    from toolchain.tvm.schedules.explain import Explanation


@dataclass(slots=True)
class Notes:
    """What a compilation found out.

    Attributes:
        unscheduled: names of functions that no rule fits.
        rules: function -> the rule that scheduled it, "" for none.
        kernels: function -> what its rule decided.
        functions: how many functions there are.
    """

    unscheduled: list[str] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, Explanation] = field(default_factory=dict)
    functions: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """One step; ``make`` gives the passes to run in order, for a machine."""

    group: int
    name: str
    purpose: str
    make: Callable[[Machine, Notes], list[Any]]


def _canonicalize(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    return [
        transform.CanonicalizeBindings(),
        transform.DecomposeOpsForInference(),
        transform.Normalize(),
        transform.EliminateCommonSubexpr(),
    ]


def _integer(machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.bounds import name_bounds
    from toolchain.tvm.graph.constants import fold_constants
    from toolchain.tvm.graph.integer import integer_regions

    if machine.kind != "cpu":
        return []
    return [fold_constants(), name_bounds(), transform.CanonicalizeBindings(), integer_regions()]


def _fold(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.constants import fold_constants, fold_remaining
    from toolchain.tvm.graph.indices import clamp_indices

    return [fold_constants(), fold_remaining(), clamp_indices(), transform.DeadCodeElimination()]


def _simplify(machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.bounds import name_bounds
    from toolchain.tvm.graph.lines import lines_as_images
    from toolchain.tvm.graph.products import flatten_rows
    from toolchain.tvm.graph.reshapes import sink_reshapes
    from toolchain.tvm.graph.volumes import volumes_as_images

    images = [lines_as_images(), volumes_as_images()] if machine.kind == "cpu" else []
    return [name_bounds(), *images, flatten_rows(), sink_reshapes(), transform.CanonicalizeBindings()]


def _layout(machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.attention import attention_kernels
    from toolchain.tvm.graph.blocked import block_layouts
    from toolchain.tvm.graph.byte_tables import byte_tables
    from toolchain.tvm.graph.matmul import computed_products
    from toolchain.tvm.graph.products import pack_products
    from toolchain.tvm.graph.rows import row_kernels

    if machine.kind != "cpu":
        return []
    products = [pack_products(machine), attention_kernels(machine), computed_products(machine)]
    nests = [*products, byte_tables(machine), row_kernels(machine)]
    return [block_layouts(machine), transform.CanonicalizeBindings(), *nests]


def _dispatch(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import backend

    return [backend.DispatchSampling(), backend.DispatchSortScan()]


def _legalize(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    return [transform.LegalizeOps()]


def _annotate(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.byte_tables import fuse_tables
    from toolchain.tvm.graph.constants import fold_remaining

    return [transform.AnnotateTIROpPattern(), fuse_tables(), fold_remaining(), transform.DeadCodeElimination()]


def _fuse(machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    from toolchain.tvm.graph.shared import share_loop_nests

    shared = [share_loop_nests()] if machine.kind == "cpu" else []
    return [transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination(), *shared]


def _vectorizable(machine: Machine, _notes: Notes) -> list[Any]:
    from toolchain.tvm.transcendental import vector_functions

    return [vector_functions()] if machine.kind == "cpu" else []


def _schedule(machine: Machine, notes: Notes) -> list[Any]:
    if machine.kind == "cpu":
        from toolchain.tvm.schedules import schedule_pass
        from toolchain.tvm.schedules.tails import split_tails
        from toolchain.tvm.schedules.transposed import transpose_tiles

        return [schedule_pass(machine, notes), split_tails(), transpose_tiles()]
    from tvm.s_tir import dlight as dl

    gpu = dl.gpu
    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
    return [dl.ApplyDefaultSchedule(*rules)]


def _dataflow(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    return [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
    ]


def _plan(machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    graphs = [transform.RewriteCUDAGraph()] if machine.kind == "cuda" else []
    return [transform.StaticPlanBlockMemory(), *graphs, transform.LowerAllocTensor(), transform.KillAfterLastUse()]


def _lower(_machine: Machine, _notes: Notes) -> list[Any]:
    from tvm.relax import transform

    return [
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        _order_shape_stores(),
        transform.AttachGlobalSymbol(),
    ]


def _order_shape_stores() -> Any:
    """A pass that puts the stores of each shape function in the order of their slots.

    VMShapeLower walks a table keyed by addresses, so with dynamic sizes the same module gave other bytes from
    run to run.  Each store computes its own slot from the slots of the inputs' sizes, never from another
    store's, so any order means the same.
    """
    tvm = load_tvm()
    from tvm.tirx import BufferStore, SeqStmt

    @tvm.transform.module_pass(opt_level=0, name="toolchain.order_shape_stores")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        module = module.clone()
        for variable, function in module.functions_items():
            if not (variable.name_hint.startswith("shape_func") and isinstance(function, tvm.tirx.PrimFunc)):
                continue
            body = function.body
            if isinstance(body, SeqStmt) and all(isinstance(statement, BufferStore) for statement in body.seq):
                ordered = sorted(body.seq, key=lambda store: int(store.indices[0]))
                module.update_func(variable, function.with_body(SeqStmt(ordered)))
        return module

    return apply


PHASES: tuple[Phase, ...] = (
    Phase(2, "canonicalize", "one binding per value; normalizations as inference; no value twice", _canonicalize),
    Phase(3, "integer", "CPU: products of quantized values in integers, requantized behind them", _integer),
    Phase(3, "fold", "compute what depends on weights alone; drop what nothing reads; indices kept in bounds", _fold),
    Phase(4, "simplify", "bounds as operators; products on rows; reshapes behind element-wise work", _simplify),
    Phase(5, "layout", "CPU: images in blocks of channels; weights packed for their loop nests", _layout),
    Phase(6, "dispatch", "sorting, scanning and sampling to implementations that the target has", _dispatch),
    Phase(6, "legalize", "each operator that is none yet to a loop nest", _legalize),
    Phase(7, "annotate", "each loop nest's fusion pattern; compute what legalizing made constant", _annotate),
    Phase(7, "fuse", "element-wise work into the loop nest that makes its input", _fuse),
    Phase(7, "functions", "CPU: exponential and its like as polynomials, which vectorize", _vectorizable),
    Phase(8, "schedule", "CPU: rules by what the target has; CUDA: dlight's rules", _schedule),
    Phase(9, "dataflow", "calls write into given buffers", _dataflow),
    Phase(9, "plan", "share buffers between values that don't live at once", _plan),
    Phase(10, "lower", "shapes, allocation and calls to the virtual machine's built-ins", _lower),
)  # fmt: skip
"""Groups 2 to 10, in order; 1 is the import, 11 code generation, 12 linking."""


_MACHINE_PHASES = frozenset({"plan", "lower"})
"""What only the virtual machine needs: an engine ahead of time plans its memory itself."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A module of which nothing is left but calls of scheduled loop nests; ``number`` counts the phases so far."""

    module: Any
    number: int


def prepare_module(module: Any, machine: Machine, notes: Notes, dump: Path | None = None) -> Prepared:
    """Runs the phases that every form of an engine shares.

    Args:
        module: an imported Relax module with static or symbolic shapes; not changed.
        machine: the target.
        notes: filled in.
        dump: folder for the IR after each phase, or None.

    Raises:
        Refusal: a phase failed; the text names it.
        ToolchainError: BAD_TARGET; MISSING_TOOL when CUDA needs nvcc.
    """
    tvm = load_tvm()
    if machine.kind == "cuda":
        cuda.prepare(str(machine.target.get("arch", "")))
    dump_module(dump, 1, "import", module)
    shared = [phase for phase in PHASES if phase.name not in _MACHINE_PHASES]
    prepared = _run_phases(Prepared(module, 1), shared, machine, notes, dump)
    notes.functions = sum(isinstance(f, tvm.tirx.PrimFunc) for _, f in prepared.module.functions_items())
    return prepared


def compile_prepared(prepared: Prepared, machine: Machine, notes: Notes, dump: Path | None = None) -> Any:
    """The virtual machine's form: an executable for :func:`toolchain.tvm.link.link_executable`.

    Raises:
        Refusal: a phase or the code generation failed; the text names the phase.
    """
    tvm = load_tvm()
    own = [phase for phase in PHASES if phase.name in _MACHINE_PHASES]
    lowered = _run_phases(prepared, own, machine, notes, dump)
    lowering = _tir_pipeline(machine, dump, lowered.number + 1)
    try:
        return tvm.relax.build(lowered.module, machine.code_target(), relax_pipeline=None, tir_pipeline=lowering)
    except Exception as error:
        raise Refusal(f"TVM's code generation failed: {one_line(error)}") from error


def compile_module(module: Any, machine: Machine, notes: Notes, dump: Path | None = None) -> Any:
    """:func:`prepare_module`, then :func:`compile_prepared`."""
    return compile_prepared(prepare_module(module, machine, notes, dump), machine, notes, dump)


def _run_phases(prepared: Prepared, phases: list[Phase], machine: Machine, notes: Notes, dump: Path | None) -> Prepared:
    tvm = load_tvm()
    module, number, target = prepared.module, prepared.number, machine.tvm_target()
    for phase in phases:
        number += 1
        try:
            with target, tvm.transform.PassContext(opt_level=3):
                module = tvm.transform.Sequential(phase.make(machine, notes))(module)
        except Exception as error:
            raise Refusal(f"TVM's phase {phase.name!r} failed: {one_line(error)}") from error
        dump_module(dump, number, phase.name, module)
    return Prepared(module, number)


def _tir_pipeline(machine: Machine, dump: Path | None, number: int) -> str:
    """Name of a registered pipeline: TVM's own for loop nests, which also dumps what it lowered."""
    load_tvm()
    from tvm.ir.transform import Sequential, module_pass
    from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

    passes, host, device = get_tir_pipeline("default")

    @module_pass(opt_level=0, name="toolchain.dump")  # type: ignore[untyped-decorator]
    def dump_lowered(module: Any, _context: Any) -> Any:
        dump_module(dump, number, "codegen", module)
        return module

    targeted = [dot_products(machine.dot()), vector_lookups(machine.lookup())]
    own = [passes, stack_locals(), *targeted, nan_order(machine.arch), dump_lowered]
    register_tir_pipeline("toolchain", lambda: (Sequential(own), host, device))
    return "toolchain"


def dump_module(folder: Path | None, number: int, name: str, module: Any) -> None:
    """Writes ``<NN>-<name>.py`` into ``folder``; nothing for None."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = str(module.script(show_meta=False))
        (folder / f"{number:02d}-{name}.py").write_text(re.sub(r"0x[0-9a-f]{9,}", "0x...", text))
