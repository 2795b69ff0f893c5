"""data: the batches that the user's function yields, checked and stored; or seeded random ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.data import Batch, limited, normalise, write_batches
from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec, Signature
from toolchain.stage import StageContext, StageDef, StageResult
from toolchain.user_code import load_function

RANDOM_SAMPLES = 16
"""Samples of a random dataset when no limit is given."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the data stage.

    Attributes:
        source: ``file.py:function`` relative to the repository's root; "" makes random inputs.
        role: ``"calibration"``, ``"evaluation"`` or ``"random"``; names the recipe's key in messages.
        limit: number of samples to keep, or None for all.
        inputs, dims: as the recipe declares them; without inputs, the contract of the optional input
            artifact ``onnx`` is used, and without that too any dict of arrays is taken.
    """

    source: str
    role: str
    limit: int | None = None
    inputs: tuple[InputSpec, ...] = ()
    dims: tuple[DimSpec, ...] = ()


def run(ctx: StageContext) -> StageResult:
    """Optional input ``onnx``; output ``dataset``.

    Raises:
        ToolchainError: USER_CODE for a function that raises, yields nothing or the wrong thing;
            BAD_RECIPE for a missing function.
    """
    options: Options = ctx.options
    signature = _signature(ctx, options)
    batches = _yielded(ctx, options, signature) if options.source else random_batches(signature, options.limit)
    try:
        kept = limited(batches, signature, options.limit)
        summary = write_batches(ctx.output("dataset"), kept, random=not options.source)
    except ToolchainError as error:
        if options.source and not error.where.startswith(f"data.{options.role}"):
            error.where = ", ".join(filter(None, [f"data.{options.role} = {options.source!r}", error.where]))
        raise
    facts = {name: summary[name] for name in ("batches", "samples", "inputs", "labels")}
    return StageResult({**facts, "role": options.role, "random": not options.source})


def random_batches(signature: Signature, limit: int | None = None) -> Iterator[Batch]:
    """Seeded random inputs, :data:`RANDOM_SAMPLES` samples or ``limit``; sizes of named dimensions vary.

    Raises:
        ToolchainError: BAD_RECIPE when there are no declared inputs, or an integer one has no range.
    """
    import numpy as np

    from toolchain.graph.inputs import random_inputs

    if not signature.inputs:
        raise ToolchainError(
            "random inputs need declared inputs",
            where="model.inputs",
            hint="declare [[model.inputs]], or give data.evaluation",
            code=ExitCode.BAD_RECIPE,
        )
    generator = np.random.default_rng(0)
    variants = signature.check_sizes()
    left, number = limit or RANDOM_SAMPLES, 0
    while left > 0:
        sizes = variants[number % len(variants)]
        count = sizes.get(signature.batch_dim or "", 1)
        yield Batch(random_inputs(signature, sizes, generator), {}, count)
        left, number = left - count, number + 1


def _yielded(ctx: StageContext, options: Options, signature: Signature) -> Iterator[Batch]:
    function = load_function(options.source, ctx.root, f"data.{options.role}")
    for number, item in enumerate(function.iterate()):
        yield normalise(item, signature, number)


def _signature(ctx: StageContext, options: Options) -> Signature:
    if not options.inputs and "onnx" in ctx.inputs:
        contract: dict[str, Any] = json.loads((ctx.inputs["onnx"] / "contract.json").read_text())
        return Signature.from_contract(contract)
    return Signature.of(options.inputs, options.dims)


STAGE = StageDef(
    name="data",
    version=2,
    run="toolchain.stages.data:run",
    options=Options,
    tools=("numpy", "torch"),
    worker="torch",
    user_code=True,
)
