"""Small 8-bit models, one or more for each family of CPU schedules, and some of random sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper
from qdq_support import Qdq, residual_block
from schedule_models import Case, Feeds, normal


def _quantized_convolution(
    activation: str, channels: int, filters: int, kernel: int, *, group: int = 1, stride: int = 1
) -> Case:
    q = Qdq([2, channels, 11, 12], activation)
    sizes = {"group": group, "pads": [kernel // 2] * 4, "strides": [stride] * 2}
    return _convolution_of(q, filters, (kernel, kernel), sizes)


def _convolution_of(q: Qdq, filters: int, kernel: tuple[int, int], sizes: Mapping[str, Any]) -> Case:
    channels, group = q.shape[1], sizes["group"]
    weights, scales = q.weights(filters, channels // group, *kernel)
    y = q.add("Conv", q.quantized("x"), weights, q.bias(filters, np.float32(0.05) * scales), **sizes)
    model = q.model(q.add("QuantizeLinear", q.add("Relu", y), *q.parameters(0.1, 5)))
    rule = "depthwise" if 1 < group == channels == filters else "convolution int8"
    return Case(model, _images(q.shape), frozenset({rule}), "steps")


def _convolution_of_any_image(activation: str) -> Case:
    """Height and width known at run time only."""
    q = Qdq([1, 20, "h", "w"], activation)  # type: ignore[list-item]
    weights, scales = q.weights(18, 20, 3, 3)
    y = q.add("Conv", q.quantized("x"), weights, q.bias(18, np.float32(0.05) * scales), pads=[1] * 4)
    model = q.model(q.add("QuantizeLinear", q.add("Relu", y), *q.parameters(0.1, 5)))
    feeds = [feed for size in ((1, 1), (7, 9), (12, 14)) for feed in _images([1, 20, *size])]
    return Case(model, feeds, frozenset({"convolution int8"}), "steps")


def random_convolution(seed: int) -> Case:
    """An 8-bit convolution of any kernel, stride, dilation, padding and size."""
    random = np.random.default_rng(seed)
    group = int(random.choice([1, 1, 1, 2]))
    channels, filters = (32, 64) if group > 1 else (int(random.integers(1, 41)), int(random.integers(1, 41)))
    shape = [int(random.integers(1, 3)), channels, *(int(size) for size in random.integers(5, 15, 2))]
    kernel = (int(random.integers(1, 4)), int(random.integers(1, 4)))
    sizes = {
        "group": group, "pads": random.integers(0, 3, 4).tolist(), "strides": random.integers(1, 3, 2).tolist(),
        "dilations": random.integers(1, 3, 2).tolist(),
    }  # fmt: skip
    return _convolution_of(Qdq(shape, str(random.choice(["uint8", "int8"])), seed), filters, kernel, sizes)


def random_product(seed: int) -> Case:
    """An 8-bit product of any size, rows known or not."""
    random = np.random.default_rng(seed)
    depth, columns, rows = (int(random.integers(1, most)) for most in (80, 80, 30))
    kind = str(random.choice(["uint8", "int8"]))
    return _quantized_dense(kind, rows if random.random() < 0.6 else "n", depth, columns)


def _quantized_dense(activation: str, rows: int | str, depth: int, columns: int) -> Case:
    q = Qdq([rows, depth], activation)  # type: ignore[list-item]
    weights, scales = q.weights(columns, depth)
    y = q.add("Gemm", q.quantized("x"), weights, q.bias(columns, np.float32(0.05) * scales), transB=1)
    model = q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 60)))
    sizes = [rows] if isinstance(rows, int) else [1, 2, 7, 16]
    return Case(model, [feed for m in sizes for feed in _images([m, depth])], frozenset({"dense int8"}), "steps")


def _lowest_values(rows: int) -> Case:
    """Data and weights of -128: two products are one more than 16 bits hold."""
    q = Qdq([rows, 16], "int8")
    names = [q.constant(np.full((8, 16), -128, np.int8)), q.constant(np.float32(7e-4)), q.constant(np.int8(0))]
    y = q.add("Gemm", q.quantized("x"), q.add("DequantizeLinear", *names), transB=1)
    model = q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 5)))
    return Case(model, [{"x": np.full((rows, 16), -99, np.float32)}], frozenset({"dense int8"}), "steps")


def large_product() -> Case:
    """Large enough that little else counts."""
    return _quantized_dense("uint8", 64, 256, 256)


def _dynamic_product(columns: int) -> Case:
    q = Qdq([2, 9, 37])
    q.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "scale", "zero"], name="quantize"))
    weights = q.constant(q.random.integers(-127, 128, (37, columns)).astype(np.int8))
    total = q.add("Cast", q.add("MatMulInteger", "a", weights, "zero"), to=1)
    scales = q.constant(q.random.uniform(0.001, 0.02, columns).astype(np.float32))
    model = q.model(q.add("Mul", total, q.add("Mul", "scale", scales)), "float32")
    return Case(model, _images([2, 9, 37]), frozenset({"dense int8"}), "network")


def _network(activation: str) -> Case:
    q, result = residual_block(activation)
    rules = frozenset({"convolution int8", "dense int8", "depthwise"})
    return Case(q.model(result, "float32"), _images([1, 3, 20, 20]), rules, "network")


def _images(shape: Sequence[int]) -> list[Feeds]:
    return [{"x": normal(np.random.default_rng(2), shape) * 3}]


def cases() -> dict[str, Case]:
    """All of them by name, those of random sizes left out."""
    made: dict[str, Case] = {}
    for kind in ("uint8", "int8"):
        made |= {
            f"convolution {kind}": _quantized_convolution(kind, 16, 24, 3),
            f"strided convolution {kind}": _quantized_convolution(kind, 20, 7, 3, stride=2),
            f"pointwise convolution {kind}": _quantized_convolution(kind, 35, 40, 1),
            f"first layer {kind}": _quantized_convolution(kind, 3, 16, 3, stride=2),
            f"depthwise {kind}": _quantized_convolution(kind, 24, 24, 3, group=24),
            f"convolution of any image {kind}": _convolution_of_any_image(kind),
            f"dense {kind}": _quantized_dense(kind, 9, 70, 45),
            f"dense dynamic {kind}": _quantized_dense(kind, "n", 33, 16),
            f"network {kind}": _network(kind),
        }
    made["dynamic product"] = _dynamic_product(21)
    made["lowest values"] = _lowest_values(5)
    return made
