"""Which products of a QDQ model run in integers, judged on the ONNX graph so that nodes can be named.

:mod:`toolchain.tvm.graph.integer` lowers a convolution or matrix product whose data and constant weights are
dequantized right before it.  One with 8-bit weights that doesn't have that form would be computed in floating
point: an engine that claims int8 and computes in fp32 is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import Refusal

if TYPE_CHECKING:
    import onnx

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_MOVES = frozenset({
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Gather", "Expand",
})  # fmt: skip
"""Operators that hand 8-bit values on as they are; Concat does if all its inputs are 8-bit."""

_EIGHT_BITS = (2, 3)  # onnx.TensorProto.UINT8, INT8


@dataclass(frozen=True, slots=True)
class _Graph:
    makers: Mapping[str, onnx.NodeProto]
    constants: Mapping[str, onnx.TensorProto]

    def maker(self, name: str, operator: str) -> Any:
        """The node that makes ``name`` if it is of ``operator``, else None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == operator else None

    def weights(self, name: str) -> Any:
        """The DequantizeLinear node of constant 8-bit weights, seen through changes of shape, else None."""
        node = self.makers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Identity"):
            node = self.makers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        tensor = self.constants.get(node.input[0])
        return node if tensor is not None and tensor.data_type in _EIGHT_BITS else None

    def is_quantized(self, name: str) -> bool:
        """Whether a value is made of 8-bit values by dequantization."""
        node = self.makers.get(name)
        if node is None:
            return False
        if node.op_type == "Concat":
            return all(self.is_quantized(each) for each in node.input)
        if node.op_type in _MOVES:
            return self.is_quantized(node.input[0])
        return node.op_type == "DequantizeLinear"


def check_integer_products(model: onnx.ModelProto) -> None:
    """Refuses a model with a product of 8-bit weights that would not be computed in integers.

    Raises:
        Refusal: names the operator and node, and says why.
    """
    graph = _graph(model)
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        weights = [name for name in node.input[:2] if graph.weights(name) is not None]
        problem = _problem(graph, node) if weights else ""
        if problem:
            raise Refusal(
                f"operator {node.op_type} (node {node.name!r}): {problem}, so it would be computed in float32: an "
                "engine that claims int8 and computes in fp32 is not offered"
            )


def float_products(model: onnx.ModelProto) -> list[str]:
    """Names of products of two quantized values, neither of them constant: they are computed in floating point."""
    graph = _graph(model)
    return sorted(
        node.name
        for node in model.graph.node
        if node.op_type in _PRODUCTS
        and all(graph.is_quantized(name) and graph.weights(name) is None for name in node.input[:2])
    )


def refuse_quantized(model: onnx.ModelProto) -> None:
    """For devices without integer lowering.

    Raises:
        Refusal: a product reads dequantized values.
    """
    graph = _graph(model)
    for node in model.graph.node:
        if node.op_type in _PRODUCTS and any(graph.is_quantized(name) for name in node.input[:2]):
            raise Refusal(
                f"operator {node.op_type} (node {node.name!r}): TVM computes on dequantized values in float32 on this "
                "device: an engine that claims int8 and computes in fp32 is not offered"
            )


def _graph(model: onnx.ModelProto) -> _Graph:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    return _Graph({name: node for node in model.graph.node for name in node.output}, constants)


def _problem(graph: _Graph, node: onnx.NodeProto) -> str:
    """Why a product with 8-bit weights doesn't become one of integers; "" if it does."""
    if node.op_type == "ConvTranspose":
        return "there is no integer form of it"
    if graph.weights(node.input[1]) is None:
        return "its first factor is constant"
    if not graph.is_quantized(node.input[0]):
        return "its weights are quantized, its data are not"
    weights = graph.weights(node.input[1])
    tensor = graph.constants[weights.input[0]]
    if node.op_type == "Conv" and len(tensor.dims) not in (3, 4):
        return f"its weights have {len(tensor.dims)} axes"
    if node.op_type != "Conv" and len(tensor.dims) != 2:
        return f"its weights have {len(tensor.dims)} axes"
    gemm = {a.name: a for a in node.attribute}
    if node.op_type == "Gemm" and "alpha" in gemm and gemm["alpha"].f != 1.0:
        return "alpha is not 1"
    if len(weights.input) > 2 and _wrong_zero(graph.constants.get(weights.input[2]), tensor.data_type):
        return "the zero point of its weights is not the middle of their range"
    return ""


def _wrong_zero(zero: onnx.TensorProto | None, element_type: int) -> bool:
    from onnx import numpy_helper

    if zero is None:
        return True
    values: Sequence[Any] = numpy_helper.to_array(zero).ravel().tolist()
    return any(value != (128 if element_type == 2 else 0) for value in values)
