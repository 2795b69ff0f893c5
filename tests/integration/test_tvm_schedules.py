"""Loop nests of many shapes through the CPU schedules: values as in ONNX Runtime, and which rule took hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from tvm_support import X86_V3, Graph, Stages, save_unary

from toolchain.host import detect_host
from toolchain.stages import compile_tvm
from toolchain.stages.compile_tvm import Options

V3 = Options(X86_V3, "cpu", "x86_64", True, 256, 16, "cc", "2.28", "fp32")

pytestmark = pytest.mark.skipif(
    detect_host().arch != "x86_64" or "avx2" not in detect_host().cpu_features,
    reason="these tests run AVX2 code on this machine",
)

Shape = list[int | str]


def conv_odd(g: Graph) -> str:
    x = g.add("Conv", "x", g.weight(20, 3, 5, 3, scale=0.2), g.weight(20), strides=[2, 1], pads=[1, 0, 2, 1])
    return g.add("Conv", g.add("Relu", x), g.weight(7, 20, 1, 1, scale=0.2))


def conv_dilated_residual(g: Graph) -> str:
    first = g.add("Conv", "x", g.weight(16, 3, 1, 1), g.weight(16))
    x = g.add("Conv", first, g.weight(16, 16, 3, 3, scale=0.1), g.weight(16), dilations=[2, 2], pads=[2] * 4)
    return g.add("Relu", g.add("Add", x, first))


def depthwise_separable(g: Graph) -> str:
    x = g.add("Conv", "x", g.weight(32, 3, 3, 3, scale=0.3), g.weight(32), strides=[2, 2], pads=[1] * 4)
    x = g.add("Clip", x, g.constant(np.float32(0)), g.constant(np.float32(6)))
    x = g.add("Conv", x, g.weight(32, 1, 3, 3, scale=0.3), g.weight(32), group=32, pads=[1] * 4)
    return g.add("Conv", x, g.weight(16, 32, 1, 1, scale=0.2), g.weight(16))


def pools(g: Graph) -> str:
    x = g.add("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=0)
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[1, 1])
    return g.add("Flatten", g.add("GlobalAveragePool", x))


def upsampled(g: Graph) -> str:
    x = g.add("ConvTranspose", "x", g.weight(3, 8, 2, 2, scale=0.3), strides=[2, 2])
    return g.add("Resize", x, "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear")


def dense_chain(g: Graph) -> str:
    x = g.add("Gemm", g.add("Flatten", "x"), g.weight(33, 3 * 13 * 12, scale=0.05), g.weight(33), transB=1)
    x = g.add("Gemm", g.add("Tanh", x), g.weight(33, 48, scale=0.1), g.weight(48))
    return g.add("LogSoftmax", g.add("Mul", x, g.add("Sigmoid", x)), axis=-1)


def batched_products(g: Graph) -> str:
    x = g.add("MatMul", "x", g.add("Transpose", "x", perm=[0, 1, 3, 2]))
    x = g.add("Softmax", x, axis=-1)
    return g.add("LayerNormalization", g.add("MatMul", x, "x"), g.weight(12), g.weight(12), axis=-1)


def sort_and_scan(g: Graph) -> str:
    x = g.add("TopK", "x", g.constant(np.array([5])), outputs=2, axis=-1)
    return g.add("CumSum", x, g.constant(np.array(2)))


MODELS = (conv_odd, conv_dilated_residual, depthwise_separable, pools, upsampled, dense_chain, batched_products)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("batch", ["batch", 2], ids=["dynamic", "static"])
def test_every_loop_nest_gets_a_schedule_and_the_values_agree(
    stages: Stages, tmp_path: Path, build: Callable[[Graph], str], batch: str | int
) -> None:
    g = Graph()
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, build(g), [batch, 3, 13, 12], None))
    assert ran.refused == ""
    assert ran.facts["unscheduled"] == []
    assert ran.facts["checked"] == "native"
    assert ran.facts["max_abs_error"] < 1e-4


def test_what_no_rule_fits_stays_naive_is_listed_and_still_agrees(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    ran = stages.run(compile_tvm, V3, save_unary(tmp_path / "onnx", g, sort_and_scan(g), [2, 3, 13, 12], None))
    assert ran.refused == ""
    assert ran.facts["unscheduled"]
    assert ran.facts["max_abs_error"] < 1e-4


def test_convolutions_and_products_are_tiled_into_vector_registers(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    model = save_unary(tmp_path / "onnx", g, conv_dilated_residual(g), [1, 3, 13, 12], None)
    stages.run(compile_tvm, V3, model, dump=tmp_path / "ir")
    text = next((tmp_path / "ir").glob("*-schedule.py")).read_text()
    assert 'scope="local"' in text
    assert "T.unroll" in text
    assert "T.vectorized(T.int64(8))" in text or "T.vectorized(8)" in text


def test_float16_agrees_within_its_precision(stages: Stages, tmp_path: Path) -> None:
    g = Graph()
    x = g.add("Cast", "x", to=TensorProto.FLOAT16)
    half = g.constant((np.random.default_rng(1).standard_normal((16, 3, 3, 3)) * 0.2).astype(np.float16))
    x = g.add("Relu", g.add("Conv", x, half, pads=[1] * 4))
    model = save_unary(tmp_path / "onnx", g, g.add("Cast", x, to=TensorProto.FLOAT), ["batch", 3, 13, 12], None)
    ran = stages.run(compile_tvm, replace(V3, precision="fp16"), model)
    assert ran.refused == ""
    assert ran.facts["checked"] == "native"
    assert ran.facts["max_abs_error"] < 0.02
