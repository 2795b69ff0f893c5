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


def _is_uint64(view: NodeView) -> bool:
    return bool(view.dtypes) and view.dtypes[0] == onnx.TensorProto.UINT64


RULES: tuple[Rule, ...] = (
    Rule(  # 0.70
        _ops("RoiAlign"), "TVM computes mode 'max' wrong", lambda v: v.attrs.get("mode", "avg") == "max"
    ),
    Rule(  # (0, 3) for (3, 3)
        _ops("NonMaxSuppression"), "TVM selects no boxes", lambda _view: True
    ),
    Rule(_ops("TopK"), "TVM can't sort uint64", _is_uint64),
    Rule(  # 8.0
        _ops("BatchNormalization"),
        "TVM uses the given statistics in training mode",
        lambda v: v.attrs.get("training_mode", 0) != 0,
    ),
)
