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
    "IsInf of one sign": graph("IsInf", detect_negative=0),
    "an empty reduction": graph("ReduceSum", shape=(2, 0, 4), constants=(np.array([1]),)),
    "a reduction over no axes": graph("ReduceL1", noop_with_empty_axes=1),
    "an integer mean": graph("ReduceMean", dtype=INT64),
    "pooling SAME_LOWER": graph("MaxPool", kernel_shape=[3, 2], auto_pad="SAME_LOWER"),
    "a fractional scale": resize([1, 1, 2.3, 1.7]),
    "a scale of an unknown size": resize([1, 1, 0.5, 0.5], shape=(1, 2, "h", "w")),
    "scaled channels": resize([1, 2, 2, 2]),
    "antialias": resize([1, 1, 0.5, 0.5], antialias=1),
    "ConvTranspose with output_shape": graph(
        "ConvTranspose", constants=(np.ones((2, 3, 3, 3), np.float32),), output_shape=[16, 16]
    ),
    "the mean of a normalization": graph(
        "LayerNormalization", constants=(np.ones(8, np.float32),), outputs=("y", "mean"), extra=("y", "mean")
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


@pytest.mark.parametrize(
    ("operator", "domain"), [("ConvInteger", ""), ("DequantizeLinear", ""), ("QGemm", "com.microsoft")]
)
def test_quantized_operators_are_refused_because_tvm_computes_in_float(operator: str, domain: str) -> None:
    with pytest.raises(Refusal, match=rf"operator {operator} .*an int8 engine would compute in fp32"):
        check_operators(graph(operator, domain=domain))
