"""reference: the original model's outputs on the evaluation dataset, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.errors import ToolchainError
from toolchain.export.source import ModelOptions
from toolchain.stage import StageContext, StageDef, StageResult

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Options(ModelOptions):
    """Options of the reference stage: the model's, the same as export's."""


def run(ctx: StageContext) -> StageResult:
    """Input ``evaluation``; output ``reference``.

    Runs the PyTorch model itself, or an .onnx source in ONNX Runtime with optimizations off.

    Raises:
        ToolchainError: EXPORT when the model fails on a batch or an output is not finite (which output,
            which batch); BAD_RECIPE and USER_CODE for what the recipe names.
    """
    from toolchain.data import write_outputs
    from toolchain.export.original import open_original

    original = open_original(ctx.options, ctx.root)
    summary = write_outputs(ctx.output("reference"), _outputs(ctx, original))
    return StageResult({"batches": summary["batches"], "outputs": summary["outputs"]})


def _outputs(ctx: StageContext, original: Any) -> Iterator[dict[str, NDArray[Any]]]:
    from toolchain.data import is_random, read_batches
    from toolchain.export.original import NotFiniteError
    from toolchain.graph.inputs import blame_random

    for number, batch in enumerate(read_batches(ctx.inputs["evaluation"])):
        inputs = {name: batch.inputs[name] for name in original.signature.names if name in batch.inputs}
        try:
            yield original.run(inputs)
        except ToolchainError as error:
            error.where = f"evaluation batch {number}, {error.where}"
            if isinstance(error, NotFiniteError) and is_random(ctx.inputs["evaluation"]):
                raise blame_random(error, original.signature) from None
            raise


STAGE = StageDef(
    name="reference",
    version=1,
    run="toolchain.stages.reference:run",
    options=Options,
    tools=("torch", "onnxruntime", "numpy"),
    worker="torch",
    user_code=True,
)
