"""QDQ models put together operator by operator, and what they are defined to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


class Qdq:
    """Collects a QDQ model: every value between two operators is quantized."""

    def __init__(self, shape: Sequence[int], activation: str = "uint8", seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.activation = activation
        self.random = np.random.default_rng(seed)
        self.shape = list(shape)

    def add(self, operator: str, *inputs: str, **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attrs))
        return name

    def constant(self, array: np.ndarray | np.generic) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def parameters(self, scale: float, zero: int) -> tuple[str, str]:
        return self.constant(np.float32(scale)), self.constant(np.array(zero, self.activation))

    def quantized(self, value: str, scale: float = 0.05, zero: int = 3) -> str:
        """The 8-bit tensor and back: the name of the real values."""
        given = self.parameters(scale, zero)
        return self.add("DequantizeLinear", self.add("QuantizeLinear", value, *given), *given)

    def weights(self, *shape: int, axis: int | None = 0, bits: int = 8) -> tuple[str, np.ndarray]:
        """Dequantized s8 weights, a scale for each index of ``axis`` or one for all; their name and scales."""
        limit = (1 << (bits - 1)) - 1
        values = self.random.integers(-limit, limit + 1, shape).astype(np.int8)
        count = 1 if axis is None else shape[axis]
        scales = self.random.uniform(0.001, 0.02, count).astype(np.float32)
        scales = scales if axis is not None else scales.reshape(())
        zeros = np.zeros(scales.shape, np.int8)
        names = (self.constant(values), self.constant(scales), self.constant(zeros))
        return self.add("DequantizeLinear", *names, **({} if axis is None else {"axis": axis})), scales

    def bias(self, count: int, scale: np.ndarray) -> str:
        """As quantizers write it: int32, of the scale of data times weights."""
        values = self.random.integers(-2000, 2000, count).astype(np.int32)
        return self.add("DequantizeLinear", self.constant(values), self.constant(np.broadcast_to(scale, count)), axis=0)

    def model(self, result: str, kind: str = "", shape: Sequence[int | str] | None = None) -> onnx.ModelProto:
        """Gives ``result``; ``kind``: its type if it isn't that of activations."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(kind or self.activation))
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or self.shape)],
            [helper.make_tensor_value_info(result, element, None)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 21 if "16" in self.activation else 18)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def as_defined(model: onnx.ModelProto, feeds: np.ndarray | Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs for inputs by name, or for the only one, ``x``.

    ONNX Runtime without optimizations: each operator by its definition, in floating point.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": feeds} if isinstance(feeds, np.ndarray) else dict(feeds))
    return results


def residual_block(activation: str) -> tuple[Qdq, str]:
    """Two convolutions and a residual addition, pooling, concatenation, average and a dense layer."""
    q = Qdq([1, 3, 20, 20], activation)

    def conv(x: str, oc: int, ic: int, kernel: int, stride: int, relu: bool, group: int = 1) -> str:
        weights, scales = q.weights(oc, ic // group, kernel, kernel)
        bias = q.bias(oc, np.float32(0.05) * scales)
        y = q.add("Conv", x, weights, bias, strides=[stride] * 2, pads=[kernel // 2] * 4, group=group)
        return q.quantized(q.add("Relu", y) if relu else y)

    first = conv(q.quantized("x"), 24, 3, 3, 2, True)
    pooled = q.quantized(q.add("MaxPool", first, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]))
    second = conv(conv(pooled, 24, 24, 3, 1, True, group=24), 24, 24, 1, 1, False)
    total = q.quantized(q.add("Relu", q.add("Add", second, pooled)))
    joined = q.quantized(q.add("Concat", total, first, axis=1))
    third = conv(joined, 40, 48, 3, 2, True)
    mean = q.quantized(q.add("GlobalAveragePool", third))
    weights, scales = q.weights(10, 40)
    flat = q.quantized(q.add("Flatten", mean))
    return q, q.add("Gemm", flat, weights, q.bias(10, np.float32(0.05) * scales), transB=1)
