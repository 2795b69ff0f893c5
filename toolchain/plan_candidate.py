"""The precisions of a target, and the stages that make each one's model."""

from __future__ import annotations

import dataclasses
from typing import Any

from toolchain.errors import ExitCode
from toolchain.plan_shared import Maker, metric_fields
from toolchain.quantize.scheme import AccuracyLimits, Scheme
from toolchain.stages import mixed, quantize
from toolchain.target import TargetProfile


def precisions_of(maker: Maker, profile: TargetProfile) -> list[str]:
    asked = maker.recipe.quantize.precisions
    return [p for p in profile.numerics.precisions if asked is None or p in asked]


def add_candidate(maker: Maker, profile: TargetProfile, precision: str, at: str) -> tuple[str, str]:
    """The reference of the candidate's model, and why there is none."""
    if precision == "fp32":
        return f"optimize{at}:onnx", ""
    calibrated = maker.recipe.data.calibration is not None
    if precision in ("int8-static", "int8-mixed") and not calibrated:
        return "", "the recipe has no data.calibration"
    inputs = {"onnx": f"optimize{at}:onnx"} | ({"calibration": "calibration:dataset"} if calibrated else {})
    scheme = _scheme(maker, profile)
    if precision == "int8-mixed":
        if maker.recipe.data.evaluation is None:
            return "", "the recipe has no data.evaluation to search on"
        inputs |= {"evaluation": "evaluation:dataset", "reference": "reference:reference"}
        checked = f"verify[int8-static/onnxruntime]{at}"
        if any(node.id == checked for node in maker.nodes):
            # Where plain static int8 holds the gates already, its verdict says so and nothing need be searched.
            inputs["verdict"] = f"{checked}:verdict"
        gates = maker.recipe.gates_for(profile.name)
        limits = AccuracyLimits(**{f.name: getattr(gates, f.name) for f in dataclasses.fields(AccuracyLimits)})
        options: Any = mixed.Options(
            **scheme, **metric_fields(maker), limits=limits, max_float_layers=maker.recipe.quantize.max_float_layers
        )
        stage = mixed.STAGE
    else:
        options, stage = quantize.Options(**scheme, precision=precision), quantize.STAGE
    name = f"quantize[{precision}]{at}"
    optional = frozenset({"verdict"} & inputs.keys())
    maker.add(name, stage, options, inputs, optional=optional, failure=ExitCode.QUANTIZE, target=profile.name)
    return f"{name}:onnx", ""


def _scheme(maker: Maker, profile: TargetProfile) -> dict[str, Any]:
    numerics, settings = profile.numerics, maker.recipe.quantize
    own = {f.name: getattr(numerics, f.name) for f in dataclasses.fields(Scheme) if hasattr(numerics, f.name)}
    percentile = {} if settings.percentile is None else {"percentile": settings.percentile}
    return {**own, "method": settings.method, "exclude": tuple(settings.exclude), **percentile}
