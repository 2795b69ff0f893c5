"""Multiplications and additions that a model's definition asks for, from its ONNX file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def count_flops(path: Path, sizes: Mapping[str, int]) -> float:
    """Two per multiply-add of convolutions, matrix products, GRU and LSTM; all else is not counted.

    Args:
        path: the ONNX file.
        sizes: of its dynamic axes.
    """
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(path)
    for name, size in sizes.items():
        make_dim_param_fixed(model.graph, name, size)
    # Shapes noted for the dynamic graph would hide the fixed ones.
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in [*graph.input, *graph.output, *graph.value_info]:
        shapes[info.name] = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
    return sum(_node(node, shapes) for node in graph.node)


def _node(node: Any, shapes: dict[str, tuple[int, ...]]) -> float:
    inputs = [shapes.get(name, ()) for name in node.input]
    output = shapes.get(node.output[0], ())
    if node.op_type == "Conv":
        return 2.0 * math.prod(output) * math.prod(inputs[1][1:])
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2.0 * math.prod(output) * inputs[0][0 if transposed else 1]
    if node.op_type == "MatMul":
        return 2.0 * math.prod(output) * inputs[0][-1] if inputs[0] else 0.0
    if node.op_type in ("GRU", "LSTM") and len(inputs[0]) == 3:
        steps_and_batch = inputs[0][0] * inputs[0][1]
        return 2.0 * steps_and_batch * (math.prod(inputs[1]) + math.prod(inputs[2]))
    return 0.0
