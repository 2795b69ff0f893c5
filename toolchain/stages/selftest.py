"""selftest: a few of the evaluation inputs and the original's outputs, for a bundle to check itself with."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the selftest stage: ``rows`` is how many samples of the first batch are kept."""

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
    arrays = {}
    for prefix, specs, values in (
        ("input", contract["inputs"], batch.inputs),
        ("output", contract["outputs"], outputs),
    ):
        for spec in specs:
            array = values[spec["name"]]
            if spec["shape"] and spec["shape"][0] in rows:
                array = array[: options.rows]
            arrays[f"{prefix}:{spec['name']}"] = array
    write_npz(ctx.output("selftest") / "selftest.npz", arrays)
    return StageResult({"rows": options.rows})


STAGE = StageDef(
    name="selftest",
    version=1,
    run="toolchain.stages.selftest:run",
    options=Options,
    tools=(),
    worker="onnx",
)
