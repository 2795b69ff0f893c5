"""quantize: one lower precision of an ONNX model (fp16, int8-static or int8-dynamic)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.quantize.scheme import Scheme
from toolchain.stage import StageContext, StageDef, StageResult

if TYPE_CHECKING:
    from toolchain.quantize.weights import Held

PRECISIONS = ("fp16", "int8-static", "int8-dynamic")


@dataclass(frozen=True, slots=True)
class Options(Scheme):
    """Options of the quantize stage: the scheme (see :class:`Scheme`) and

    Attributes:
        precision: one of :data:`PRECISIONS`.
    """

    precision: str = "int8-static"


def run(ctx: StageContext) -> StageResult:
    """Inputs ``onnx`` and, for int8-static, ``calibration``; output ``onnx``.

    fp16 keeps float32 inputs and outputs, so contract.json stays as it is.  Refused when the result would not
    be what its name says: nothing quantized, or no valid model.

    Raises:
        ToolchainError: QUANTIZE for settings or node names that don't exist, and empty calibration data.
    """
    from toolchain.quantize.model import MODEL, copy_contract, load_prepared, sample_feed
    from toolchain.quantize.static import check_excluded
    from toolchain.quantize.weights import load_held

    options: Options = ctx.options
    options.check()
    if options.precision not in PRECISIONS:
        what = f"got {options.precision!r}{did_you_mean(options.precision, PRECISIONS)}"
        what += f"; allowed: {', '.join(PRECISIONS)}"
        raise ToolchainError(what, where="quantize.precision", code=ExitCode.QUANTIZE)
    source = ctx.inputs["onnx"]
    feed = sample_feed(source, ctx.inputs.get("calibration"))
    if options.precision == "fp16":
        held = load_held(source)
        check_excluded(held.model, options)
        result = _fp16(ctx, held, feed)
    else:
        model = load_prepared(source)
        check_excluded(model, options)
        result = (_static if options.precision == "int8-static" else _dynamic)(ctx, model, feed)
    if not result.refused:
        target = ctx.output("onnx")
        copy_contract(source, target)
        sizes = {"bytes_before": _size(source), "bytes_after": _size(target)}
        result = StageResult({"precision": options.precision, **sizes, **result.facts})
        assert (target / MODEL).exists()
    return result


def _fp16(ctx: StageContext, held: Held, feed: Any) -> StageResult:
    from toolchain.quantize.float16 import convert_float16

    result = convert_float16(held, ctx.output("onnx"), feed, ctx.options.exclude)
    facts: dict[str, Any] = {
        "kept_float32_ops": list(result.kept_ops),
        "kept_float32_nodes": list(result.kept_nodes),
        "clamped_constants": list(result.clamped),
    }
    if result.problem:
        tried = f" (also with {', '.join(result.kept_ops)} kept in float32)" if result.kept_ops else ""
        return _refused(ctx, facts, f"no valid float16 model{tried}: {result.problem}")
    if held.model.graph.initializer and not result.halved:
        return _refused(ctx, facts, "no weight became float16")
    return StageResult(facts)


def _static(ctx: StageContext, model: Any, feed: Any) -> StageResult:
    from toolchain.quantize.calibration import calibrate
    from toolchain.quantize.model import find_problem, write_model
    from toolchain.quantize.report import static_facts
    from toolchain.quantize.scheme import WEIGHTED_OPS
    from toolchain.quantize.static import quantize_static

    options: Options = ctx.options
    calibration = calibrate(model, ctx.inputs["calibration"], options)
    quantized = quantize_static(model, calibration, options)
    facts = static_facts(model, quantized, calibration, options)
    if not WEIGHTED_OPS & facts["quantized"].keys():
        return _refused(ctx, facts, f"nothing to quantize: no {_any_of(WEIGHTED_OPS)} can be int8{_why(facts)}")
    path = write_model(quantized, ctx.output("onnx"))
    # The sample is the first batch of the calibration data.
    if problem := find_problem(path, feed, dict(calibration.outputs)):
        return _refused(ctx, facts, f"the int8 model is invalid: {problem}")
    return StageResult(facts | _running(path, options.activation))


def _dynamic(ctx: StageContext, model: Any, feed: Any) -> StageResult:
    from toolchain.quantize.dynamic import DYNAMIC_OPS, quantize_dynamic, quantized_nodes
    from toolchain.quantize.model import find_problem, run_session, session_of, write_model
    from toolchain.quantize.report import dynamic_reasons, node_facts

    options: Options = ctx.options
    with session_of(model) as session:
        reference = run_session(session, feed)
    quantized = quantize_dynamic(model, options)
    names = quantized_nodes(model, quantized)
    facts = {"scheme": f"u8s8 dynamic{', per channel' if options.per_channel else ''}"}
    facts |= node_facts(model, names, (), dynamic_reasons(model, options), DYNAMIC_OPS)
    if not names:
        return _refused(
            ctx, facts, f"nothing to quantize: no {_any_of(DYNAMIC_OPS)} with constant weights{_why(facts)}"
        )
    path = write_model(quantized, ctx.output("onnx"))
    if problem := find_problem(path, feed, reference):
        return _refused(ctx, facts, f"the int8 model is invalid: {problem}")
    return StageResult(facts | _running(path, "u8"))


def _running(path: Path, activation: str) -> dict[str, Any]:
    from toolchain.quantize.report import running_operators

    return {"running_int8_operators": running_operators(path, activation)}


def _refused(ctx: StageContext, facts: dict[str, Any], reason: str) -> StageResult:
    import shutil

    shutil.rmtree(ctx.out / "onnx", ignore_errors=True)
    return StageResult({"precision": ctx.options.precision, **facts}, refused=reason)


def _any_of(operators: frozenset[str]) -> str:
    *most, last = sorted(operators)
    return f"{', '.join(most)} or {last}"


def _why(facts: dict[str, Any]) -> str:
    """The reasons of the nodes that could have been quantized, for a refusal's one line."""
    general = ("the operator has no int8 form here", "it does not compute on floats")
    groups = [g for g in facts["stayed_float"] if g["reason"] not in general]
    return "".join(f"; {g['count']} {g['op']}: {g['reason']}" for g in groups[:3])


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("model.onnx*"))


STAGE = StageDef(
    name="quantize",
    version=1,
    run="toolchain.stages.quantize:run",
    options=Options,
    tools=("onnx", "onnxruntime", "onnxconverter-common"),
    worker="onnx",
)
