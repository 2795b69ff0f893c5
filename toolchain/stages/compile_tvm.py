"""compile_tvm: a candidate as a native library made by TVM, or a refusal that names the operator or phase."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.stage import StageContext, StageDef, StageResult
from toolchain.tvm.variants import Job, Options, compile_sizes, how_checked, machine_of

__all__ = ["STAGE", "Options", "programs", "run"]

if TYPE_CHECKING:
    from toolchain.specs import Signature
    from toolchain.tvm.forms import Interface

LIBRARY_LIMIT = 2**31 - 2**26
"""Bytes of weights that one library holds: its code reaches 2 GiB of data, on most processors."""


def run(ctx: StageContext) -> StageResult:
    """Input ``onnx``; output ``engine``: engine.json, contract.json and one library per size variant.

    With form ``"static"`` there is an output ``objects`` too, for the stage link_static.

    Where this machine can't run CPU code for the target there is an output ``twin`` too: the same engine by the same
    rules for this machine, for what needs a whole data set run.

    Raises:
        ToolchainError: MISSING_TOOL, COMPILE or BAD_TARGET: nothing wrong with the model.
    """
    import onnx

    from toolchain.specs import Signature
    from toolchain.tvm.compare import Reference
    from toolchain.tvm.importer import check_operators
    from toolchain.tvm.integer_products import refuse_quantized
    from toolchain.tvm.library import Refusal
    from toolchain.tvm.link import Linker
    from toolchain.tvm.sizes import conform_inputs

    options: Options = ctx.options
    source = ctx.inputs["onnx"]
    # Known at once: found out by the linker, it takes minutes and several times the memory.
    if (size := sum(path.stat().st_size for path in source.glob("model.onnx*"))) > LIBRARY_LIMIT:
        limit = f"{LIBRARY_LIMIT / 1e9:.1f} GB"
        why = f"{size / 1e9:.1f} GB of weights: TVM's engines hold them in one library, {limit} at most"
        return StageResult(refused=why)
    contract = json.loads((source / "contract.json").read_text())
    signature = Signature.from_contract(contract)
    model = onnx.load(source / "model.onnx")
    conform_inputs(model, signature)
    linker = Linker(options.linker, options.arch, options.libc_min)
    linker.check()
    machine = machine_of(options)
    try:
        check_operators(model)
        if options.kind != "cpu":
            refuse_quantized(model)
        folder = ctx.out / "parts"
        (folder / "twin").mkdir(parents=True)
        reference = Reference(source / "model.onnx")
        interface = _interface(signature, contract)
        job = Job(options, signature, reference, linker, machine, folder, ctx.dump_ir, interface)
        facts = compile_sizes(job, model)
    except Refusal as refusal:
        shutil.rmtree(ctx.out / "parts", ignore_errors=True)
        return StageResult(refused=str(refusal))
    if options.form == "static":
        _write_objects(job, ctx.output("objects"))
    return StageResult(_write_engine(ctx, folder, facts))


def _write_objects(job: Job, output: Path) -> None:
    """What a static executable is linked from; the stage link_static does it."""
    from toolchain.tvm.aot.library import write_objects

    engine = job.form.engine if job.form is not None else None
    assert engine is not None, "a static engine is one ahead of time"
    for name in write_objects(engine, job.linker, job.folder, static=True):
        shutil.move(job.folder / name, output / name)


def _interface(signature: Signature, contract: Mapping[str, Any]) -> Interface:
    from toolchain.tvm.forms import Interface

    outputs = tuple(output["name"] for output in contract["outputs"])
    limits = {name: (dim.min, dim.max) for name, dim in signature.dims.items()}
    return Interface(tuple(spec.name for spec in signature.inputs), outputs, limits)


def _write_engine(ctx: StageContext, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Moves the libraries into the outputs and describes them; returns the facts with their size."""
    options: Options = ctx.options
    size = sum((folder / variant["file"]).stat().st_size for variant in facts["variants"])
    _move_engine(ctx, "engine", folder, facts)
    if any((folder / "twin").iterdir()) and options.kind == "cpu":
        _move_engine(ctx, "twin", folder / "twin", facts)
    shutil.rmtree(folder)
    return {**facts, "bytes": size}


def _move_engine(ctx: StageContext, name: str, folder: Path, facts: dict[str, Any]) -> None:
    output = ctx.output(name)
    for variant in facts["variants"]:
        shutil.move(folder / variant["file"], output / variant["file"])
    shutil.copyfile(ctx.inputs["onnx"] / "contract.json", output / "contract.json")
    engine = {
        "schema": 1,
        "backend": "tvm",
        "precision": ctx.options.precision,
        "device": ctx.options.kind,
        "form": facts["form"],
        "variants": facts["variants"],
    }
    (output / "engine.json").write_text(json.dumps(engine, sort_keys=True, indent=1) + "\n")


def programs(options: Options) -> tuple[str, ...]:
    """The programs on PATH whose versions can change the result."""
    from toolchain.tvm.link import Linker

    names = Linker(options.linker, options.arch, options.libc_min).programs
    if how_checked(options) != "native":
        names += Linker("cc", options.arch, "").programs  # links the library that stands in for it
    names += (options.emulator,) if options.emulator else ()
    return tuple(dict.fromkeys(names + (("nvcc",) if options.kind == "cuda" else ())))


STAGE = StageDef(
    name="compile_tvm",
    version=6,
    run="toolchain.stages.compile_tvm:run",
    options=Options,
    tools=("apache-tvm", "onnx", "onnxruntime", "onnxslim", "numpy", "ziglang"),
    worker="tvm",
    programs=programs,
)
