"""Converters beside TVM's own, against ONNX Runtime on random shapes and attributes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tvm_support import Graph, compiled

from toolchain.tvm.importer import import_model
from toolchain.tvm.library import Refusal

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from onnx_cases import host_machine

MACHINE = host_machine()

Arrays = Mapping[str, np.ndarray | None]


def node_model(
    operator: str, inputs: Arrays, outputs: int, weights: Sequence[str], domain: str, attrs: Mapping[str, Any]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node and what to feed it; inputs named in ``weights`` are initializers."""
    known = {n: a for n, a in inputs.items() if a is not None}
    fed = {n: a for n, a in known.items() if n not in weights}
    names = ["" if a is None else n for n, a in inputs.items()]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, results, name="n", domain=domain, **attrs)],
        "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in fed.items()],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [numpy_helper.from_array(a, n) for n, a in known.items() if n in weights],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return (model if domain else onnx.shape_inference.infer_shapes(model)), fed


def in_tvm(
    operator: str, inputs: Arrays, outputs: int = 1, weights: Sequence[str] = (), domain: str = "", **attrs: Any
) -> list[np.ndarray]:
    """The node's outputs, compiled for this machine."""
    model, fed = node_model(operator, inputs, outputs, weights, domain, attrs)
    return compiled(model, MACHINE)[0].run(list(fed.values()))


def both(
    operator: str, inputs: Arrays, outputs: int = 1, weights: Sequence[str] = (), domain: str = "", **attrs: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of TVM and of ONNX Runtime."""
    model, fed = node_model(operator, inputs, outputs, weights, domain, attrs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return in_tvm(operator, inputs, outputs, weights, domain, **attrs), session.run(None, fed)


def agree(pair: tuple[list[np.ndarray], list[np.ndarray]], steps: int = 0) -> None:
    """Floats to 1e-5, integers to ``steps``."""
    for have, want in zip(*pair, strict=True):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        if want.dtype.kind == "f":
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
        else:
            assert np.abs(have.astype(np.int64) - want.astype(np.int64)).max(initial=0) <= steps


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.5)


FEW = settings(max_examples=5)
DIRECTIONS = st.sampled_from(["forward", "reverse", "bidirectional"])
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))


def recurrent(sizes: tuple[int, ...], direction: str, gates: int, *, bias: bool, first: bool, lengths: bool) -> Any:
    """Inputs X, W, R, B, sequence_lens, initial_h of a recurrent operator."""
    steps, batch, width, hidden = sizes
    count = 2 if direction == "bidirectional" else 1
    each = np.random.default_rng(0).integers(1, steps, batch, endpoint=True).astype(np.int32)
    return {
        "x": normal(1, steps, batch, width),
        "w": normal(2, count, gates * hidden, width),
        "r": normal(3, count, gates * hidden, hidden),
        "b": normal(4, count, 2 * gates * hidden) if bias else None,
        "lengths": each if lengths else None,
        "h": normal(5, count, batch, hidden) if first else None,
    }


WEIGHTS = ("w", "r", "b", "p")


@FEW
@given(SIZES, DIRECTIONS, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_lstm_with_peepholes_lengths_and_first_states(
    sizes: tuple[int, ...], direction: str, bias: bool, first: bool, peepholes: bool, lengths: bool
) -> None:
    arrays = recurrent(sizes, direction, 4, bias=bias, first=first, lengths=lengths)
    count, _, hidden = arrays["r"].shape
    arrays["c"] = normal(6, count, sizes[1], hidden) if first else None
    arrays["p"] = normal(7, count, 3 * hidden) if peepholes else None
    agree(both("LSTM", arrays, 3, WEIGHTS, hidden_size=hidden, direction=direction))


@FEW
@given(SIZES, DIRECTIONS, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_gru_with_the_reset_before_or_after_the_product(
    sizes: tuple[int, ...], direction: str, bias: bool, first: bool, after: bool, lengths: bool
) -> None:
    arrays = recurrent(sizes, direction, 3, bias=bias, first=first, lengths=lengths)
    hidden = arrays["r"].shape[2]
    agree(both("GRU", arrays, 2, WEIGHTS, hidden_size=hidden, direction=direction, linear_before_reset=int(after)))


@FEW
@given(SIZES, DIRECTIONS, st.sampled_from(["Tanh", "Relu", "Sigmoid"]))
def test_rnn_with_other_activations(sizes: tuple[int, ...], direction: str, activation: str) -> None:
    arrays = recurrent(sizes, direction, 1, bias=True, first=True, lengths=False)
    count, _, hidden = arrays["r"].shape
    names = [activation] * count
    agree(both("RNN", arrays, 2, WEIGHTS, hidden_size=hidden, direction=direction, activations=names))


def test_lstm_with_the_batch_first_is_the_transposed_one() -> None:
    arrays = recurrent((4, 2, 3, 5), "forward", 4, bias=True, first=False, lengths=False)
    plain, _ = both("LSTM", arrays, 3, WEIGHTS, hidden_size=5)
    arrays["x"] = np.ascontiguousarray(arrays["x"].transpose(1, 0, 2))
    turned = in_tvm("LSTM", arrays, 3, WEIGHTS, hidden_size=5, layout=1)
    np.testing.assert_allclose(turned[0], plain[0].transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[1], plain[1].transpose(1, 0, 2), rtol=1e-5, atol=1e-6)


def bytes_of(seed: int, dtype: str, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@FEW
@given(
    st.sampled_from([("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")]),
    st.sampled_from([0, 3, 100]),
    st.sampled_from([1, 2]),
    st.sampled_from([(1, 1), (2, 1)]),
    st.booleans(),
)
def test_quantized_convolution_agrees_within_one_step(
    types: tuple[str, str], zero: int, groups: int, strides: tuple[int, int], per_channel: bool
) -> None:
    """Inputs x, w, their scales and zero points, and an int32 bias."""
    x, w = bytes_of(1, types[0], 1, 4, 7, 6), bytes_of(2, types[1], 6, 4 // groups, 3, 3)
    scales = np.linspace(0.01, 0.02, 6, dtype=np.float32) if per_channel else np.float32(0.013)
    # ONNX Runtime demands the weights' zero points to be alike.
    w_zero = np.full(6 if per_channel else (), 128 if types[1] == "uint8" else 0, types[1])
    arrays = {
        "x": x, "xs": np.float32(0.05), "xz": np.array(zero, types[0]), "w": w, "ws": np.asarray(scales),
        "wz": w_zero, "ys": np.float32(0.9), "yz": np.array(zero, types[0]),
        "bias": np.arange(-3, 3, dtype=np.int32) * 500,
    }  # fmt: skip
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    weights = tuple(n for n in arrays if n != "x")
    pads = [1, 0, 1, 2]
    agree(both("QLinearConv", arrays, 1, weights, group=groups, strides=strides, pads=pads), steps=1)


@FEW
@given(st.sampled_from(["uint8", "int8"]), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.integers(0, 50))
def test_integer_matrix_products_are_exact(kind: str, rows: int, inner: int, columns: int, zero: int) -> None:
    a, b = bytes_of(1, "uint8", 2, rows, inner), bytes_of(2, kind, inner, columns)
    arrays = {"a": a, "b": b, "az": np.array(zero, "uint8"), "bz": np.array(min(zero, 7), kind)}
    agree(both("MatMulInteger", arrays, 1, ("b", "bz")))
    agree(both("MatMulInteger", {**arrays, "bz": None, "az": None}, 1, ("b",)))


@FEW
@given(
    st.sampled_from(["nearest", "linear", "cubic"]),
    st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]),
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
)
def test_resize_to_any_size(mode: str, coordinates: str, sizes: tuple[int, int], wanted: tuple[int, int]) -> None:
    arrays = {
        "x": normal(1, 1, 2, *sizes), "roi": None, "scales": None, "sizes": np.array([1, 2, *wanted], np.int64),
    }  # fmt: skip
    agree(both("Resize", arrays, 1, ("sizes",), mode=mode, coordinate_transformation_mode=coordinates))


@FEW
@given(
    st.sampled_from(["ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSumExp"]),
    st.sets(st.integers(-3, 2), min_size=1, max_size=2).filter(lambda axes: len({a % 3 for a in axes}) == len(axes)),
    st.booleans(),
)
def test_reductions_over_any_axes(operator: str, axes: set[int], keep: bool) -> None:
    arrays = {"x": normal(1, 3, 4, 5), "axes": np.array(sorted(axes), np.int64)}
    agree(both(operator, arrays, 1, ("axes",), keepdims=int(keep)))


def test_a_maximum_of_minus_infinities_is_minus_infinity() -> None:
    arrays = {"x": np.full((2, 3), -np.inf, np.float32), "axes": np.array([1])}
    assert in_tvm("ReduceMax", arrays, 1, ("axes",))[0].tolist() == [[-np.inf], [-np.inf]]


@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_a_dynamic_number_of_steps_is_refused_without_blaming_the_model(operator: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[operator]
    weights = {"w": np.ones((1, gates * 3, 2), np.float32), "r": np.ones((1, gates * 3, 3), np.float32)}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w", "r"], ["y"], name="n", hidden_size=3)],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["steps", 1, 2])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(Refusal) as caught:
        import_model(onnx.shape_inference.infer_shapes(model))
    told = str(caught.value)
    assert told.startswith(f"operator {operator} (node 'n'): the number of steps is dynamic")
    assert "this import into TVM does not support" in told
    assert "ONNX Runtime's engine takes any length" in told


def in_both(model: onnx.ModelProto, feeds: Sequence[np.ndarray]) -> None:
    """The same values from TVM and ONNX Runtime for each value of ``x``."""
    library, _ = compiled(onnx.shape_inference.infer_shapes(model), MACHINE)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in feeds:
        agree(([np.asarray(y) for y in library.run([x])], session.run(None, {"x": x})))


def test_sizes_that_are_computed_of_others_give_shapes_ranges_and_broadcasts() -> None:
    g = Graph()
    batch, length = g.add("Shape", "x", end=1), g.add("Shape", "x", start=1, end=2)
    number = g.add("Squeeze", length)
    half = g.add("Reshape", g.add("Div", number, g.constant(np.array(2))), g.constant(np.array([-1])))
    four = g.constant(np.array([4]))
    x = g.add("Reshape", "x", g.add("Concat", batch, half, g.constant(np.array([2])), four, axis=0))
    wide = g.add("Concat", batch, half, g.constant(np.array([2])), four, axis=0)
    x = g.add("Expand", g.add("ReduceSum", x, g.constant(np.array([2]))), wide)
    places = g.add("Range", g.constant(np.array(0)), number, g.constant(np.array(1)))
    places = g.add("Unsqueeze", g.add("Cast", places, to=onnx.TensorProto.FLOAT), g.constant(np.array([1])))
    x = g.add("Add", g.add("Reshape", x, g.add("Concat", batch, length, four, axis=0)), places)
    graph = helper.make_graph(
        [*g.nodes, helper.make_node("Identity", [x], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", "k", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        g.weights,
    )
    in_both(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        [normal(n, n, k, 4) for n, k in ((1, 6), (3, 2), (2, 10))],
    )


@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_recurrent_networks_take_any_batch(operator: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[operator]
    weights = {"w": normal(1, 1, gates * 3, 2), "r": normal(2, 1, gates * 3, 3), "b": normal(3, 1, gates * 6)}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *weights], ["y"], name="n", hidden_size=3)],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, "n", 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    in_both(model, [normal(n, 5, n, 2) for n in (1, 4, 7)])
