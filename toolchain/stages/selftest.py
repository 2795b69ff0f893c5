"""selftest: a few of the evaluation inputs and the original's outputs, for a bundle to check itself with."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the selftest stage.

    Attributes:
        rows: how many samples of the first batch are kept; all of them where an output has no axis for samples, such as
            one whose size depends on values: what it would be for fewer is not known.
    """

    rows: int = 2


def run(ctx: StageContext) -> StageResult:
    """Inputs ``onnx`` (for its contract), ``evaluation``, ``reference``; output ``selftest`` (selftest.npz)."""
    import json

    from toolchain.data import read_batches, read_outputs, write_npz

    options: Options = ctx.options
    contract = json.loads((ctx.inputs["onnx"] / "contract.json").read_text())
    rows = {name for name, dim in contract["dims"].items() if dim["batch"]}
    batch = next(iter(read_batches(ctx.inputs["evaluation"])))
    outputs = next(iter(read_outputs(ctx.inputs["reference"])))
    cut = all(spec["shape"] and spec["shape"][0] in rows for spec in contract["outputs"])
    arrays = {}
    for prefix, specs, values in (
        ("input", contract["inputs"], batch.inputs),
        ("output", contract["outputs"], outputs),
    ):
        for spec in specs:
            array = values[spec["name"]]
            if cut and spec["shape"] and spec["shape"][0] in rows:
                array = array[: options.rows]
            arrays[f"{prefix}:{spec['name']}"] = array
    write_npz(ctx.output("selftest") / "selftest.npz", arrays)
    return StageResult({"rows": options.rows if cut else None})


STAGE = StageDef(
    name="selftest",
    version=2,
    run="toolchain.stages.selftest:run",
    options=Options,
    tools=(),
    worker="onnx",
)
