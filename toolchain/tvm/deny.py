"""Operators that TVM 0.27 imports without complaint and computes wrong, as data with the reason of each.

Each rule was measured by running the node in TVM (default pipeline, x86-64-v3) and in ONNX Runtime 1.32 on
seeded normal inputs; a figure in a comment is the largest absolute difference seen.  Measured and found right,
so not listed: BitShift with shifts below the width (all unsigned types), Mod with fmod=1 (float and integer),
DepthToSpace in both modes, AveragePool with every padding mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node with what the rules look at.

    Attributes:
        attrs: attribute name -> value, strings decoded.
        shapes: shape of each input as far as inferred, None for an unknown rank, None axes for unknown sizes.
        constants: value of each input that is an initializer or a Constant node, else None (numpy arrays).
        dtypes: ONNX element type of each input, 0 if unknown.
        outputs: names of the outputs that something reads.
    """

    node: onnx.NodeProto
    attrs: Mapping[str, Any]
    shapes: tuple[tuple[int | None, ...] | None, ...]
    constants: tuple[Any, ...]
    dtypes: tuple[int, ...]
    outputs: frozenset[str]

    def constant(self, index: int) -> Any:
        """The constant value of input ``index``, or None."""
        return self.constants[index] if index < len(self.constants) else None

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        return self.shapes[index] if index < len(self.shapes) else None


@dataclass(frozen=True, slots=True)
class Rule:
    """A case of some operators that TVM computes wrong; ``applies`` says whether a node is that case."""

    operators: frozenset[str]
    reason: str
    applies: Callable[[NodeView], bool]


def _ops(*names: str) -> frozenset[str]:
    return frozenset(names)


def _reads_later_outputs(view: NodeView) -> bool:
    return any(name in view.outputs for name in view.node.output[1:] if name)


def _reduces_empty_axis(view: NodeView) -> bool:
    return 0 in (view.shape(0) or ())


def _is_noop_reduction(view: NodeView) -> bool:
    axes = view.constant(1)
    has_axes = len(view.node.input) > 1 and bool(view.node.input[1]) and (axes is None or axes.size > 0)
    return bool(view.attrs.get("noop_with_empty_axes", 0)) and not has_axes


def _is_integer_mean(view: NodeView) -> bool:
    integers = {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    return bool(view.dtypes) and view.dtypes[0] in integers


def _resize_scales_are_inexact(view: NodeView) -> bool:
    """TVM derives the scale again from the two sizes, so it must be exactly their ratio."""
    scales, shape = view.constant(2), view.shape(0)
    if scales is None or scales.size == 0:
        return False
    for axis, scale in enumerate(float(s) for s in scales):
        size = shape[axis] if shape is not None and axis < len(shape) else None
        if scale == 1.0:
            continue
        if size is None:
            # With an unknown size only a whole factor always gives a whole size.
            if not scale.is_integer():
                return True
        elif size * scale != int(size * scale):
            return True
    return False


def _resize_touches_batch_or_channels(view: NodeView) -> bool:
    scales, sizes, shape = view.constant(2), view.constant(3), view.shape(0)
    if scales is not None and scales.size >= 2:
        return any(float(s) != 1.0 for s in scales[:2])
    if sizes is not None and sizes.size >= 2 and shape is not None:
        return any(have is not None and int(want) != have for want, have in zip(sizes[:2], shape[:2], strict=False))
    return False


_REDUCTIONS = _ops(
    "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule(
        _ops("IsInf"),
        "TVM ignores detect_negative and detect_positive",
        lambda v: v.attrs.get("detect_negative", 1) == 0 or v.attrs.get("detect_positive", 1) == 0,
    ),
    Rule(  # 0.70
        _ops("RoiAlign"), "TVM computes mode 'max' wrong", lambda v: v.attrs.get("mode", "avg") == "max"
    ),
    Rule(  # (1, 3, 15, 11) for (1, 3, 16, 12)
        _ops("ConvTranspose"), "TVM ignores output_shape and gives another size", lambda v: "output_shape" in v.attrs
    ),
    Rule(  # scalars
        _ops("LayerNormalization"), "TVM gives constants for the outputs after the first", _reads_later_outputs
    ),
    Rule(  # uninitialised memory
        _REDUCTIONS, "TVM reads uninitialised memory when the input is empty", _reduces_empty_axis
    ),
    Rule(  # 2.9 to 4.3, NaN for ReduceLogSum
        _ops("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare"),
        "TVM ignores noop_with_empty_axes",
        _is_noop_reduction,
    ),
    Rule(_ops("ReduceMean"), "TVM returns int64 for an integer mean", _is_integer_mean),
    Rule(  # (1, 2, 4, 3) for (1, 2, 4, 4)
        _ops("MaxPool", "LpPool"),
        "TVM gives another size for auto_pad SAME_LOWER",
        lambda v: v.attrs.get("auto_pad", "NOTSET") == "SAME_LOWER",
    ),
    Rule(  # the default (DCR) is right; the CRD mode of newer opsets is ignored
        _ops("SpaceToDepth"), "TVM ignores mode 'CRD'", lambda v: v.attrs.get("mode", "DCR") == "CRD"
    ),
    Rule(  # 0.49 to 4.3 with scales 2.3 and 1.7 in every mode
        _ops("Resize", "Upsample"), "TVM derives other scales from the rounded sizes", _resize_scales_are_inexact
    ),
    Rule(  # 0.89
        _ops("Resize"), "TVM ignores antialias", lambda v: v.attrs.get("antialias", 0) != 0
    ),
    Rule(  # (1, 2, 10, 9) for (1, 2, 5, 6)
        _ops("Resize"),
        "TVM ignores keep_aspect_ratio_policy",
        lambda v: v.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch",
    ),
    Rule(  # (1, 2, 10, 12) for (1, 4, 10, 12)
        _ops("Resize"), "TVM leaves batch and channels unscaled", _resize_touches_batch_or_channels
    ),
    Rule(  # the mask is float32 instead of bool
        _ops("Dropout"), "TVM gives the mask another dtype", _reads_later_outputs
    ),
)
