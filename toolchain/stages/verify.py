"""verify: an engine's outputs against the original's, and its accuracy, on the evaluation data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ToolchainError
from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the verify stage.

    Attributes:
        metric: kind of the metric (see :mod:`toolchain.metrics`), or "" for fidelity only.
        evidence: ``"native"`` when this machine is the target, ``"proxy"`` when the same engine runs here
            on another processor than the target's.
        provider: ONNX Runtime execution provider to verify with.
    """

    metric: str
    k: int
    output: str | None
    higher_is_better: bool
    evidence: str
    provider: str


def run(ctx: StageContext) -> StageResult:
    """Inputs ``engine``, ``evaluation``, ``reference``; output ``verdict`` (verdict.json)."""
    from toolchain.data import is_random, read_batches, read_outputs
    from toolchain.metrics import Fidelity, Metric, MetricSpec
    from toolchain.runtime import open_engine

    options: Options = ctx.options
    engine = open_engine(ctx.inputs["engine"], provider=options.provider, spinning=False)
    function = None
    if ".py:" in options.metric:
        from toolchain.user_code import load_function

        function = load_function(options.metric, ctx.root)
    spec = MetricSpec(options.metric, options.k, options.output, options.higher_is_better) if options.metric else None
    ours, theirs = (Metric(spec, function), Metric(spec, function)) if spec else (None, None)
    fidelity = Fidelity()
    samples, problem = 0, ""
    pairs = zip(read_batches(ctx.inputs["evaluation"]), read_outputs(ctx.inputs["reference"]), strict=True)
    for batch, reference in pairs:
        try:
            outputs = engine.run(dict(batch.inputs))
        except ToolchainError as error:
            problem = f"does not run on the evaluation data: {error.what}"
            break
        samples += batch.size
        fidelity.update(outputs, reference)
        if ours and theirs:
            ours.update(outputs, batch.labels, reference)
            theirs.update(reference, batch.labels, reference)
    facts: dict[str, Any] = {"evidence": options.evidence, "samples": samples, "problem": problem, "worst": {}}
    facts["random"] = is_random(ctx.inputs["evaluation"])
    if not problem:
        facts |= fidelity.result()
        if ours and theirs and spec:
            scores = accuracy_facts(options.metric, ours.value(), theirs.value(), spec.higher_is_better)
            facts["accuracy"] = {**scores, "chance": theirs.chance()}
    (ctx.output("verdict") / "verdict.json").write_text(json.dumps(facts, sort_keys=True, indent=1))
    return StageResult(facts)


def accuracy_facts(metric: str, value: float, original: float, higher_is_better: bool) -> Mapping[str, Any]:
    """``drop`` is positive when the engine is worse than the original, in the metric's own unit."""
    drop = original - value if higher_is_better else value - original
    return {
        "metric": metric,
        "value": value,
        "original": original,
        "drop": drop,
        "higher_is_better": higher_is_better,
    }


STAGE = StageDef(
    name="verify",
    version=2,
    run="toolchain.stages.verify:run",
    options=Options,
    tools=("onnxruntime", "apache-tvm"),
    worker="onnx",
)
