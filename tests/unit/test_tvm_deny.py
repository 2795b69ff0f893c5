"""The rules about what TVM computes wrong, and the check of a whole graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.tvm.importer import check_operators
from toolchain.tvm.library import Refusal

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def graph(
    operator: str, *, shape: tuple[Any, ...] = (1, 2, 8, 8), dtype: int = FLOAT, constants: Any = (), extra: Any = (),
    outputs: tuple[str, ...] = ("y",), domain: str = "", **attrs: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A model of one node ``n`` whose first input is ``x``; None among the constants: input left out."""
    weights = [numpy_helper.from_array(np.asarray(c), f"c{i}") for i, c in enumerate(constants) if c is not None]
    names = ["x", *("" if c is None else f"c{i}" for i, c in enumerate(constants))]
    node = helper.make_node(operator, names, list(outputs), name="n", domain=domain, **attrs)
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    results = [helper.make_empty_tensor_value_info(name) for name in (extra or outputs[:1])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph([node], "g", inputs, results, weights), opset_imports=opsets, ir_version=10
    )


def resize(scales: list[float], **options: Any) -> onnx.ModelProto:
    return graph("Resize", constants=(None, np.array(scales, np.float32)), **{"mode": "linear", **options})


WRONG = {
    "the largest of a region": graph(
        "RoiAlign", constants=(np.zeros((1, 4), np.float32), np.zeros(1, np.int64)), mode="max"
    ),
    "sorted uint64": graph("TopK", dtype=TensorProto.UINT64, constants=(np.array([1]),), outputs=("y", "i")),
    "selected boxes": graph("NonMaxSuppression", shape=(1, 6, 4), constants=(np.zeros((1, 1, 6), np.float32),)),
    "statistics in training": graph(
        "BatchNormalization", constants=[np.ones(2, np.float32)] * 4, outputs=("y", "m", "v"), training_mode=1
    ),
}

RIGHT = {
    "IsInf of both signs": graph("IsInf"),
    "a reduction": graph("ReduceSum", constants=(np.array([1]),)),
    "a reduction over all axes": graph("ReduceL1"),
    "a float mean": graph("ReduceMean"),
    "pooling SAME_UPPER": graph("MaxPool", kernel_shape=[3, 2], auto_pad="SAME_UPPER"),
    "a whole scale": resize([1, 1, 2, 3]),
    "a scale that gives a whole size": resize([1, 1, 0.5, 1.25]),
    "a whole scale of an unknown size": resize([1, 1, 2, 2], shape=(1, 2, "h", "w")),
    "a normalization": graph("LayerNormalization", constants=(np.ones(8, np.float32),), outputs=("y", "mean")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_tvm_computes_wrong_is_refused_by_operator_and_node(case: str) -> None:
    with pytest.raises(Refusal, match=rf"operator {WRONG[case].graph.node[0].op_type} \(node 'n'\): TVM "):
        check_operators(WRONG[case])


@pytest.mark.parametrize("case", RIGHT)
def test_what_tvm_computes_right_is_not_refused(case: str) -> None:
    check_operators(RIGHT[case])


def test_all_missing_operators_are_named_at_once_with_their_domain() -> None:
    model = graph("FusedConv", domain="com.microsoft")
    model.graph.node.append(helper.make_node("Det", ["x"], ["d"]))
    with pytest.raises(Refusal, match=r"operators Det \(node 'd'\), com.microsoft.FusedConv \(node 'n'\)"):
        check_operators(model)


def test_a_standard_name_in_another_domain_is_not_taken_for_the_standard_operator() -> None:
    with pytest.raises(Refusal, match=r"com.microsoft.Gelu \(node 'n'\)"):
        check_operators(graph("Gelu", domain="com.microsoft"))


def test_quantized_weights_that_would_be_multiplied_in_float_are_refused() -> None:
    model = graph("Gemm", constants=(np.ones((8, 8), np.int8),))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w1", "scale"], ["w"]))
    model.graph.node[1].input[1] = "w"
    model.graph.initializer[0].name = "w1"
    with pytest.raises(Refusal, match=r"operator Gemm \(node 'n'\): its weights are quantized, its data are not"):
        check_operators(model)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1])
def test_element_types_that_tvm_converts_wrong_are_refused(kind: int) -> None:
    with pytest.raises(Refusal, match=rf"operator Cast .*element type {TensorProto.DataType.Name(kind)}"):
        check_operators(graph("Cast", to=kind))


def test_text_and_containers_are_refused_by_name() -> None:
    with pytest.raises(Refusal, match="'x' holds text"):
        check_operators(graph("Identity", dtype=TensorProto.STRING))
    model = graph("SequenceConstruct")
    model.graph.output[0].type.sequence_type.elem_type.tensor_type.elem_type = FLOAT
    with pytest.raises(Refusal, match="'y' is a sequence"):
        check_operators(model)
