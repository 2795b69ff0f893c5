"""Nodes whose inputs are all known are computed during the import, as ONNX's reference implementation does.

Shapes, axes and conditions then reach TVM's converters as constants, whatever chain of nodes computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.tvm.operators.node import Unsupported, constant, constant_value, dtype_of, static_shape

if TYPE_CHECKING:
    import numpy as np
    import onnx

MAX_ELEMENTS = 1 << 14
"""Most elements of an input or output: larger ones are weights, which the compile pipeline folds faster."""

_NEVER = frozenset({
    "If", "Loop", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
    "Bernoulli", "Dropout",
})  # fmt: skip
"""Not functions of their inputs alone, or holding graphs that see other values."""


def fold(node: onnx.NodeProto, inputs: Sequence[Any], opset: int) -> list[Any] | None:
    """Constants for the outputs of ``node``, or None if they depend on run time or are too large."""
    if node.op_type in ("Shape", "Size") and inputs[0] is not None:
        return _fold_shape(node, inputs[0])
    if node.op_type in _NEVER or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "DequantizeLinear" and inputs[0] is not None and dtype_of(inputs[0]) in ("int8", "uint8"):
        # Weights that are multiplied as the integers they are.
        return None
    values: list[np.ndarray | None] = []
    for value in inputs:
        known = None if value is None else constant_value(value)
        if value is not None and (known is None or known.size > MAX_ELEMENTS):
            return None
        values.append(known)
    return _evaluate(node, values, opset)


def _fold_shape(node: onnx.NodeProto, value: Any) -> list[Any] | None:
    import math

    import numpy as np

    try:
        shape = static_shape(value, "")
    except Unsupported:
        return None
    if node.op_type == "Size":
        return [constant(np.int64(math.prod(shape)))]
    attrs = {a.name: a.i for a in node.attribute}
    return [constant(np.array(shape[attrs.get("start", 0) : attrs.get("end", len(shape))], np.int64))]


def _evaluate(node: onnx.NodeProto, values: Sequence[np.ndarray | None], opset: int) -> list[Any] | None:
    import warnings

    import numpy as np
    from onnx.reference import ReferenceEvaluator

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            feeds = {name: value for name, value in zip(node.input, values, strict=True) if name}
            results = ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds)
        arrays = [np.asarray(result) for result in results]
        if any(a.size > MAX_ELEMENTS * 8 or a.dtype == object for a in arrays):
            return None
        return [constant(array) for array in arrays]
    except Exception:
        # Not implemented there, or not of a type that Relax has: left to the converters.
        return None
