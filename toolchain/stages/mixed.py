"""mixed: static int8 with the most sensitive layers kept float, searched against the gates on outputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.fidelity import WORST
from toolchain.quantize.scheme import AccuracyLimits, Scheme
from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True, slots=True)
class Options(Scheme):
    """Options of the mixed stage: the scheme (see :class:`Scheme`) and

    Attributes:
        metric: kind of the metric (see :mod:`toolchain.metrics`), or "" for fidelity only.
        k, output, higher_is_better: see :class:`toolchain.metrics.MetricSpec`.
        limits: what the result must hold; without any there is nothing to search for.
        max_float_layers: most layers that may stay float; None: all but one.
        seed: of the choice of calibration batches on which layers are ranked.
    """

    metric: str = ""
    k: int = 5
    output: str | None = None
    higher_is_better: bool = True
    limits: AccuracyLimits = field(default_factory=AccuracyLimits)
    max_float_layers: int | None = None
    seed: int = 0


def run(ctx: StageContext) -> StageResult:
    """Inputs ``onnx``, ``calibration``, ``evaluation``, ``reference``; optional ``verdict``, that of plain static
    int8 of the same scheme, which saves making and evaluating it once more where it holds; output ``onnx``.

    The algorithm and its source are described in :mod:`toolchain.quantize.sensitivity`.  Refused when plain
    static int8 holds the limits already, and when nothing within the bounds does; both with the figures.

    Raises:
        ToolchainError: QUANTIZE for settings or node names that don't exist, and empty calibration data;
            USER_CODE for labels that don't fit the metric; BAD_RECIPE for an accuracy limit without a metric.
    """
    from toolchain.quantize.calibration import calibrate
    from toolchain.quantize.model import load_prepared
    from toolchain.quantize.scheme import WEIGHTED_OPS
    from toolchain.quantize.sensitivity import MAX_SAMPLES, find_layers, rank_layers, search
    from toolchain.quantize.static import check_excluded, quantize_static

    options: Options = ctx.options
    options.check()
    if options.limits == AccuracyLimits():
        return StageResult(refused="not needed: the recipe sets no accuracy or fidelity gate")
    evaluator = _evaluator(ctx)
    if (known := _verdict(ctx)) is not None and not known.misses:
        return _not_needed(known, options.limits)
    model = load_prepared(ctx.inputs["onnx"])
    check_excluded(model, options)
    calibration = calibrate(model, ctx.inputs["calibration"], options)
    layers = find_layers(model, calibration, options)
    if not any(layer.weighted for layer in layers):
        return StageResult(refused=f"nothing to quantize: no {' or '.join(sorted(WEIGHTED_OPS))} can be int8")
    everything = evaluator(quantize_static(model, calibration, options))
    if not everything.misses:
        return _not_needed(everything, options.limits)
    facts: dict[str, Any] = {"everything_int8": everything.facts(), "layers": len(layers)}

    def evaluate(kept: Collection[str]) -> Any:
        return evaluator(quantize_static(model, calibration, options, keep_float=kept))

    ranked = rank_layers(model, layers, calibration, options, ctx.inputs["calibration"], options.seed)
    facts["ranking_samples"] = min(MAX_SAMPLES, calibration.samples)
    facts["sensitivity"] = [_sensitivity_facts(entry) for entry in ranked]
    result = search(ranked, evaluate, options.max_float_layers)
    facts["tries"] = [attempt.facts() for attempt in result.tries]
    if result.kept is None:
        return StageResult(facts, refused=_failure(everything, result, len(layers), options.max_float_layers))
    return _finish(ctx, facts, (model, calibration), result.kept)


def _verdict(ctx: StageContext) -> Any:
    """The evaluation of plain static int8 that a verify stage made, or None."""
    import json

    from toolchain.quantize.evaluation import evaluation_of

    if "verdict" not in ctx.inputs:
        return None
    verdict = json.loads((ctx.inputs["verdict"] / "verdict.json").read_text())
    return evaluation_of(verdict, ctx.options.limits, ctx.options.higher_is_better)


def _not_needed(everything: Any, limits: AccuracyLimits) -> StageResult:
    names = [field.name for field in fields(limits) if getattr(limits, field.name) is not None]
    held = f"the gate{'s' * (len(names) > 1)} {', '.join(names)}"
    refusal = f"not needed: int8-static holds {held} ({everything.summary})"
    return StageResult({"everything_int8": everything.facts()}, refused=refusal)


def _finish(ctx: StageContext, facts: dict[str, Any], source: tuple[Any, Any], kept: Any) -> StageResult:
    """Write the chosen mix and state its facts."""
    import shutil

    from toolchain.quantize.model import copy_contract, find_problem, sample_feed, write_model
    from toolchain.quantize.report import running_operators, static_facts
    from toolchain.quantize.static import quantize_static

    model, calibration = source
    names = [node for entry in kept for node in entry.layer.nodes]
    quantized = quantize_static(model, calibration, ctx.options, keep_float=names)
    facts |= static_facts(model, quantized, calibration, ctx.options, names)
    facts["kept_float"] = [
        {"layer": e.layer.name, "nodes": list(e.layer.nodes), "reason": _reason(e.error)} for e in kept
    ]
    folder = ctx.output("onnx")
    path = write_model(quantized, folder)
    feed = sample_feed(ctx.inputs["onnx"], ctx.inputs["calibration"])
    if problem := find_problem(path, feed, dict(calibration.outputs)):
        shutil.rmtree(folder)
        return StageResult(facts, refused=f"the mixed model is invalid: {problem}")
    copy_contract(ctx.inputs["onnx"], folder)
    sizes = [sum(p.stat().st_size for p in f.glob("model.onnx*")) for f in (ctx.inputs["onnx"], folder)]
    facts |= {"precision": "int8-mixed", "bytes_before": sizes[0], "bytes_after": sizes[1]}
    facts["running_int8_operators"] = running_operators(path, ctx.options.activation)
    return StageResult(facts)


def _evaluator(ctx: StageContext) -> Any:
    from toolchain.metrics import MetricSpec
    from toolchain.quantize.evaluation import Evaluator

    options: Options = ctx.options
    function = None
    if ".py:" in options.metric:
        from toolchain.user_code import load_function

        function = load_function(options.metric, ctx.root)
    if not options.metric and (options.limits.accuracy_drop is not None or options.limits.min_accuracy is not None):
        what = "accuracy_drop and min_accuracy need a metric; the recipe has none"
        raise ToolchainError(what, where="gates", hint="add a [metric] table", code=ExitCode.BAD_RECIPE)
    spec = MetricSpec(options.metric, options.k, options.output, options.higher_is_better) if options.metric else None
    folders = ctx.inputs["evaluation"], ctx.inputs["reference"]
    return Evaluator(*folders, spec, function, options.limits)


def _sensitivity_facts(entry: Any) -> dict[str, Any]:
    facts = {"layer": entry.layer.name, "error": entry.error, "nodes": list(entry.layer.nodes)}
    return facts if entry.error < WORST else facts | {"error": None, "note": _reason(entry.error)}


def _reason(error: float) -> str:
    return f"relative output error {error:.3g} in int8" if error < WORST else "NaN or infinite outputs in int8"


def _failure(everything: Any, result: Any, layers: int, bound: int | None) -> str:
    tried = [f"all int8: {everything.summary}"]
    tried += [f"{len(t.kept)} of {layers} layers float: {t.evaluation.summary}" for t in result.tries[-1:]]
    last = result.tries[-1].evaluation if result.tries else everything
    within = f" with at most {bound} layers in float" if bound is not None else " with any layer left in int8"
    return f"no mix holds the gates{within}: {'; '.join(tried)}; missed: {'; '.join(last.misses)}"


STAGE = StageDef(
    name="mixed",
    version=2,
    run="toolchain.stages.mixed:run",
    options=Options,
    tools=("onnx", "onnxruntime"),
    worker="onnx",
    user_code=True,
)
