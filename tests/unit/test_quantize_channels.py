"""Scales of a weight's channels, computed at once, and value ranges over batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from toolchain.quantize.channels import ChannelQuantizer
from toolchain.quantize.model import infer_types
from toolchain.quantize.ranges import RangeFinder, calibrated_tensors


def _weights() -> NDArray[Any]:
    weights = np.random.default_rng(0).normal(0, 0.1, (9, 3, 3, 3)).astype(np.float32)
    weights[1] = 0
    weights[2] = 1e-40
    weights[3] = np.abs(weights[3])
    weights[4] = -np.abs(weights[4]) * 1e30
    weights[5] = 0.5
    return weights


def _network() -> onnx.ModelProto:
    """Conv, Relu and Gemm on 4x4 images, with weights among which are channels of all kinds."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "m"], ["y"], name="matmul"),
    ]
    rng = np.random.default_rng(1)
    constants = {
        "w": _weights(),
        "b": rng.normal(size=9).astype(np.float32),
        "m": rng.normal(size=(144, 5)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = infer_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    return model


def _quantized(quantizer: Any, per_channel: bool, reduce_range: bool, symmetric: bool) -> bytes:
    model = _network()
    extremes = (np.array([-3.0], np.float32), np.array([4.0], np.float32))
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(calibrated_tensors(model), extremes))
    made = quantizer(
        model,
        per_channel,
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges,
        [],
        [],
        ["Conv", "MatMul", "Relu"],
        {"ActivationSymmetric": False, "WeightSymmetric": symmetric},
    )
    made.quantize_model()
    text: bytes = made.model.model.SerializeToString(deterministic=True)
    return text


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_channels_at_once_give_the_bytes_that_onnxruntime_gives_one_by_one(
    per_channel: bool, reduce_range: bool, symmetric: bool
) -> None:
    settings = (per_channel, reduce_range, symmetric)

    assert _quantized(ChannelQuantizer, *settings) == _quantized(QDQQuantizer, *settings)


def test_types_are_inferred_without_the_weights_and_the_weights_stay() -> None:
    model = _network()

    values = {v.name: v.type.tensor_type for v in model.graph.value_info}
    assert [d.dim_value or d.dim_param for d in values["c"].shape.dim] == ["n", 9, 4, 4]
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), _weights())


def test_ranges_hold_the_extremes_of_all_batches_and_the_model_is_as_before(tmp_path: Path) -> None:
    model = _network()
    before = model.SerializeToString()
    finder = RangeFinder(model, tmp_path)
    batches = [np.random.default_rng(n).normal(n, 2, (n + 1, 3, 4, 4)).astype(np.float32) for n in range(3)]

    outputs = [finder.add({"x": batch})["y"] for batch in batches]

    ranges = finder.ranges()
    assert list(ranges) == ["c", "f", "r", "x", "y"]
    for name, values in (("x", batches), ("y", outputs)):
        everything = np.concatenate([v.ravel() for v in values])
        assert [float(v) for v in (*ranges[name][0], *ranges[name][1])] == [everything.min(), everything.max()]
    assert float(ranges["r"][0][0]) == 0.0
    assert ranges["r"][1] == ranges["c"][1]
    assert model.SerializeToString() == before


def test_a_value_that_is_no_number_makes_its_range_none_whichever_batch_it_is_in(tmp_path: Path) -> None:
    for place in (0, 1):
        finder = RangeFinder(_network(), tmp_path)
        batches = [np.ones((1, 3, 4, 4), np.float32) for _ in range(2)]
        batches[place][:] = np.nan
        for batch in batches:
            finder.add({"x": batch})

        low, high = finder.ranges()["y"]
        assert not np.isfinite([low[0], high[0]]).any()
