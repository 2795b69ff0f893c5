"""optimize: a smaller graph of standard operators that computes the same; or the old one, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import InputSpec, Signature
from toolchain.stage import StageContext, StageDef, StageResult

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from toolchain.graph.numeric import Difference


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the optimize stage.

    Attributes:
        fusions: whether nodes are fused (batch norm into convolution, MatMul and Add into Gemm, Pad into
            convolution ...); constants, dead and repeated nodes and shapes are worked on in any case.
        inputs: the recipe's inputs, for the ranges of random integers; integers without one are 0 or 1.
    """

    fusions: bool = True
    inputs: tuple[InputSpec, ...] = ()


def run(ctx: StageContext) -> StageResult:
    """Input ``onnx``; output ``onnx`` with the same contract.

    The result is compared with the input in ONNX Runtime, optimizations off, on random inputs at the
    example sizes and with each dynamic dimension at its minimum and at another size; tolerances are
    those of :mod:`toolchain.graph.numeric`.  When the optimizer fails, breaks the contract or changes
    the values, the input graph is kept and the fact ``kept`` says why.

    Raises:
        ToolchainError: OPTIMIZE when the input graph itself does not run.
    """
    from toolchain.graph.counts import model_facts

    options: Options = ctx.options
    source = ctx.inputs["onnx"] / "model.onnx"
    target = ctx.output("onnx") / "model.onnx"
    contract = json.loads((source.parent / "contract.json").read_text())
    shutil.copyfile(source.parent / "contract.json", target.parent / "contract.json")
    difference, kept = _optimize(source, target, contract, options)
    if kept:
        for file in target.parent.glob("model.onnx*"):
            file.unlink()
        for file in source.parent.glob("model.onnx*"):
            shutil.copyfile(file, target.parent / file.name)
    before, after = model_facts(source), model_facts(target)
    facts = {
        "nodes_before": before["nodes"],
        "nodes": after["nodes"],
        "operators_before": before["operators"],
        "operators": after["operators"],
        "parameters": after["parameters"],
        "bytes_before": before["bytes"],
        "bytes": after["bytes"],
        "kept": kept,
    }
    return StageResult({**facts, **difference.facts()})


def _optimize(source: Path, target: Path, contract: dict[str, Any], options: Options) -> tuple[Difference, str]:
    """Write the optimized model to ``target``; its difference, and the reason to keep the source instead."""
    from toolchain.export.contract import check_model, differences
    from toolchain.graph.numeric import Difference

    references = _references(source, contract, options)
    try:
        _write_slimmed(source, target, options)
        check_model(target, ExitCode.OPTIMIZE)
    except Exception as error:
        # onnxslim raises whatever its passes run into; none of it is the user's fault.
        return Difference(), f"the optimizer failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if changed := differences(target, contract):
        return Difference(), f"the optimizer changed the contract: {'; '.join(changed)}"
    difference = _difference(target, references)
    if difference.problem:
        return Difference(), f"the optimizer changed the result: {difference.problem}"
    return difference, ""


def _write_slimmed(source: Path, target: Path, options: Options) -> None:
    import onnx
    import onnx_ir as ir
    import onnxslim

    from toolchain.export.clean import save, strip
    from toolchain.export.quiet import quiet

    skip = None if options.fusions else ["graph_fusion"]
    before = onnx.load(source, load_external_data=False)
    with quiet():
        slimmed = onnxslim.slim(str(source), skip_optimizations=skip)
    if foreign := {n.domain for n in slimmed.graph.node} - {n.domain for n in before.graph.node} - {"", "ai.onnx"}:
        raise ValueError(f"operators of the domain {', '.join(sorted(foreign))} were added")
    _restore_interface(before, slimmed)
    model = ir.from_proto(slimmed)
    strip(model)
    save(model, target)


def _restore_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """The inputs and outputs as they were: onnxslim drops unused inputs and forgets symbolic sizes."""
    weights = {tensor.name for tensor in before.graph.initializer}
    outputs = [value.name for value in after.graph.output]
    if outputs != [value.name for value in before.graph.output]:
        raise ValueError(f"outputs became {', '.join(outputs)}")
    del after.graph.input[:], after.graph.output[:]
    after.graph.input.extend(value for value in before.graph.input if value.name not in weights)
    after.graph.output.extend(before.graph.output)
    after.producer_name, after.producer_version = before.producer_name, before.producer_version


def _references(
    source: Path, contract: dict[str, Any], options: Options
) -> list[tuple[Mapping[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
    """Random inputs at each size to check, with the source's outputs."""
    import numpy as np

    from toolchain.graph.inputs import random_inputs
    from toolchain.graph.numeric import run_session, session

    signature = Signature.from_contract(contract)
    ranges = {spec.name: spec for spec in options.inputs}
    specs = tuple(ranges.get(spec.name, spec) for spec in signature.inputs)
    signature = Signature(specs, signature.dims)
    generator = np.random.default_rng(1)
    inputs = [random_inputs(signature, sizes, generator, default_high=1) for sizes in signature.check_sizes()]
    try:
        opened = session(source)
        return [(arrays, run_session(opened, arrays)) for arrays in inputs]
    except Exception as error:
        raise ToolchainError(
            f"the graph to optimize does not run on random inputs: {' '.join(str(error).split())[:300]}",
            where="optimize",
            hint="give low and high for integer inputs in [[model.inputs]]",
            code=ExitCode.OPTIMIZE,
        ) from error


def _difference(
    target: Path, references: list[tuple[Mapping[str, NDArray[Any]], dict[str, NDArray[Any]]]]
) -> Difference:
    from toolchain.graph.numeric import Difference, compare, run_session, session

    worst = Difference()
    try:
        opened = session(target)
        for inputs, expected in references:
            worst = worst.worst(compare(expected, run_session(opened, inputs)))
    except Exception as error:
        return Difference(problem=f"it no longer runs: {' '.join(str(error).split())[:200]}")
    return worst


STAGE = StageDef(
    name="optimize",
    version=1,
    run="toolchain.stages.optimize:run",
    options=Options,
    tools=("onnx", "onnx-ir", "onnxslim", "onnxruntime", "numpy"),
    worker="graph",
)
