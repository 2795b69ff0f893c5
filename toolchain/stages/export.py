"""export: the model to ONNX, cleaned, checked, and compared with the original at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifact import canonical_json
from toolchain.errors import ExitCode, ToolchainError
from toolchain.export.source import ModelOptions
from toolchain.stage import StageContext, StageDef, StageResult

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from toolchain.export.contract import Observation
    from toolchain.export.original import OnnxOriginal, TorchOriginal
    from toolchain.graph.numeric import Difference

OPSETS = (18,)
"""Opsets that can be asked for: below, torch writes 18 or invalid models; from 23 on, TVM can't import attention."""


@dataclass(frozen=True, slots=True)
class Options(ModelOptions):
    """Options of the export stage: the model's, and

    Attributes:
        opset: one of :data:`OPSETS`.
        preprocessing: free text for the contract.
    """

    opset: int = 18
    preprocessing: str = ""


def run(ctx: StageContext) -> StageResult:
    """Output ``onnx``: model.onnx (weights beyond 2 GB in model.onnx.data) and contract.json.

    The stored model is compared in ONNX Runtime, optimizations off, with the original on the example
    inputs, and with each dynamic dimension at its minimum and at another size.  An output may differ by
    1e-3 of its largest absolute value (float16: 2e-2) plus 1e-6; integers in 1 % of their elements.

    Raises:
        ToolchainError: EXPORT when the model can't be converted, its outputs are not finite or the
            conversion disagrees; BAD_RECIPE and USER_CODE for what the recipe names.
    """
    from toolchain.export.original import NotFiniteError, TorchOriginal, open_original
    from toolchain.graph.inputs import blame_random

    options: Options = ctx.options
    if options.opset not in OPSETS:
        allowed = ", ".join(map(str, OPSETS))
        raise ToolchainError(f"got {options.opset}; allowed: {allowed}", where="model.opset", code=ExitCode.BAD_RECIPE)
    original = open_original(options, ctx.root)
    runs = _check_inputs(original)
    try:
        return _export(ctx, options.opset, options.preprocessing, original, runs)
    except NotFiniteError as error:
        if isinstance(original, TorchOriginal) and original.example is not None:
            raise
        raise blame_random(error, original.signature) from None


def _export(
    ctx: StageContext,
    opset: int,
    preprocessing: str,
    original: TorchOriginal | OnnxOriginal,
    runs: list[Mapping[str, NDArray[Any]]],
) -> StageResult:
    from toolchain.export.clean import save
    from toolchain.export.contract import check_model, make_contract, name_output_axes
    from toolchain.export.original import TorchOriginal
    from toolchain.graph.counts import model_facts

    facts: dict[str, Any] = {}
    if isinstance(original, TorchOriginal):
        names, expected = original.run_named(runs[0])
        model = _convert(original, runs[0], names, opset)
    else:
        expected = original.run(runs[0])
        model, facts = _adopt(original, opset)
    path = ctx.output("onnx") / "model.onnx"
    save(model, path)
    check_model(path, ExitCode.EXPORT)
    difference, observed = _agreement(original, path, runs, expected)
    if name_output_axes(model, original.signature, observed):
        save(model, path)
        check_model(path, ExitCode.EXPORT)
    contract = make_contract(path, original.signature, preprocessing)
    (path.parent / "contract.json").write_bytes(canonical_json(contract))
    counts = model_facts(path)
    facts |= {key: counts[key] for key in ("opset", "nodes", "operators", "parameters", "bytes")}
    facts |= {key: contract[key] for key in ("inputs", "outputs", "dims")}
    return StageResult({**facts, **difference.facts(), "checked_sizes": len(runs)})


def _check_inputs(original: TorchOriginal | OnnxOriginal) -> list[Mapping[str, NDArray[Any]]]:
    """The example, then inputs at the other sizes of each dynamic dimension."""
    import numpy as np

    from toolchain.export.original import TorchOriginal
    from toolchain.graph.inputs import random_inputs

    signature = original.signature
    given = original.example if isinstance(original, TorchOriginal) else None
    generator = np.random.default_rng(0)
    if given is None:
        return [random_inputs(signature, sizes, generator) for sizes in signature.check_sizes()]
    # Real values, repeated along dynamic axes: they stay within whatever range the model needs.
    return [given, *({s.name: _resized(given[s.name], s.concrete(sizes)) for s in signature.inputs}
                     for sizes in signature.check_sizes())]  # fmt: skip


def _resized(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    import numpy as np

    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
    return array


def _convert(original: TorchOriginal, example: Mapping[str, NDArray[Any]], names: list[str], opset: int) -> ir.Model:
    from toolchain.export.clean import shape_up
    from toolchain.export.outputs import select
    from toolchain.export.trace import to_onnx

    model, order = to_onnx(original, example, opset)
    if len(model.graph.outputs) != len(names):
        raise ToolchainError(
            f"the model returns {len(names)} values ({', '.join(names)}), ONNX {len(model.graph.outputs)}",
            where="model.source",
            hint="return tensors only",
            code=ExitCode.EXPORT,
        )
    shape_up(model, original.signature, order, select(names, original.outputs))
    return model


def _adopt(original: OnnxOriginal, opset: int) -> tuple[ir.Model, dict[str, Any]]:
    """The source file itself, brought to ``opset`` where that works; facts say when it was not."""
    from toolchain.export.clean import shape_up
    from toolchain.export.onnx_source import load_model
    from toolchain.export.outputs import select

    model, kept = load_model(original.path, opset)
    order = [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]
    names = [value.name or "" for value in model.graph.outputs]
    shape_up(model, original.signature, order, select(names, original.outputs))
    return model, {"opset_kept": kept} if kept else {}


def _agreement(
    original: TorchOriginal | OnnxOriginal,
    path: Path,
    runs: list[Mapping[str, NDArray[Any]]],
    first: dict[str, NDArray[Any]],
) -> tuple[Difference, list[Observation]]:
    """The worst difference over ``runs``, and the shapes seen; ``first``: the original's outputs for the first run."""
    from toolchain.graph.numeric import Difference, compare, run_session, session

    opened = session(path)
    worst = Difference()
    observed: list[Observation] = []
    for number, inputs in enumerate(runs):
        shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in inputs.items())
        reference = original.run(inputs) if number else first
        try:
            difference = compare(reference, run_session(opened, inputs))
        except Exception as error:
            difference = Difference(problem=f"ONNX Runtime fails: {' '.join(str(error).split())[:200]}")
        if difference.problem:
            raise ToolchainError(
                f"the exported model disagrees with the original at {shapes}: {difference.problem}",
                where="export",
                hint="look for sizes, random numbers or state that tracing fixed; "
                "if the disagreement is at one size only, narrow the dimension's range in [model.dims]",
                code=ExitCode.EXPORT,
            )
        worst = worst.worst(difference)
        sizes = {
            axis: inputs[spec.name].shape[index]
            for spec in original.signature.inputs
            for index, axis in enumerate(spec.shape)
            if isinstance(axis, str)
        }
        observed.append((sizes, {name: array.shape for name, array in reference.items()}))
    return worst, observed


STAGE = StageDef(
    name="export",
    version=1,
    run="toolchain.stages.export:run",
    options=Options,
    tools=("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy"),
    worker="torch",
    user_code=True,
)
