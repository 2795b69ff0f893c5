"""Softmax, normalization, reductions and attention of random sizes through the CPU rules, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tvm_support import compiled

from toolchain.host import detect_host
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes

HOST = detect_host()
# The tiles of other vector units, as code for the plainest processor of this architecture.
PLAIN = {"kind": "llvm", "mtriple": f"{HOST.arch}-linux-gnu"}
MACHINES = {
    "128 bits, 32 registers": Machine(PLAIN, "cpu", HOST.arch, 128, 32),
    "256 bits, 16 registers": Machine(PLAIN, "cpu", HOST.arch, 256, 16),
    "512 bits, 32 registers": Machine(PLAIN, "cpu", HOST.arch, 512, 32),
}
WIDE = MACHINES["512 bits, 32 registers"]
# A compilation an example: a failing one is reported as it was found, not made smaller.
EXAMPLES = settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))

Shape = Sequence[int | str]


class Rows:
    """A small model being put together; its output is the last node's."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str | np.ndarray | np.float32, **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [f"v{len(self.nodes)}"], **attributes))
        return f"v{len(self.nodes) - 1}"

    def _constant(self, value: np.ndarray | np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"w{len(self.weights)}"))
        return f"w{len(self.weights) - 1}"

    def model(self, inputs: Mapping[str, Shape]) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        output = helper.make_tensor_value_info(self.nodes[-1].output[0], TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "rows", values, [output], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)

    def check(
        self, inputs: Mapping[str, Shape], feeds: Mapping[str, np.ndarray], machine: Machine, tolerance: float = 1e-5
    ) -> Notes:
        """Compiles, and compares with ONNX Runtime on ``feeds``; NaN has to be where it has it."""
        model = self.model(inputs)
        library, notes = compiled(model, machine)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (want,) = session.run(None, dict(feeds))
        (got,) = library.run([feeds[name] for name in inputs])
        finite = want[np.isfinite(want)]
        size = max(1.0, float(np.abs(finite).max())) if finite.size else 1.0
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=tolerance * size)
        return notes


def values(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def weights(size: int) -> list[np.ndarray]:
    return [values(size, seed=3), values(size, seed=4)]


def declared(shape: Sequence[int], dynamic: Sequence[bool]) -> Shape:
    return [f"d{axis}" if changes else size for axis, (size, changes) in enumerate(zip(shape, dynamic, strict=True))]


lengths = st.one_of(st.integers(1, 70), st.sampled_from([128, 197, 256, 1000, 1029, 4100]))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), lengths)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(shape=shapes, dynamic=st.tuples(*[st.booleans()] * 3), log=st.booleans(), scale=st.sampled_from([1.0, 1e4]))
def test_softmax_of_any_length_is_one_row_kernel_and_never_overflows(
    machine: Machine, shape: tuple[int, int, int], dynamic: tuple[bool, bool, bool], log: bool, scale: float
) -> None:
    g, x = Rows(), values(*shape, scale=scale)
    x[0, 0, : shape[2] // 2] = -np.inf
    g.add("LogSoftmax" if log else "Softmax", "x", axis=-1)
    notes = g.check({"x": declared(shape, dynamic)}, {"x": x}, machine)
    assert list(notes.rules.values()) == ["rows"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("length", [5, 16, 37])
def test_a_row_of_minus_infinities_or_with_nan_gives_what_onnx_runtime_gives(length: int, dynamic: bool) -> None:
    x = values(4, length)
    x[0], x[1, 2], x[2, 3] = -np.inf, np.nan, np.inf
    g = Rows()
    g.add("Softmax", "x", axis=-1)
    g.check({"x": declared(x.shape, (dynamic, dynamic))}, {"x": x}, WIDE)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(shape=shapes, dynamic=st.tuples(st.booleans(), st.booleans()), offset=st.sampled_from([0.0, 100.0]))
def test_layer_norm_of_any_length_is_one_row_kernel(
    machine: Machine, shape: tuple[int, int, int], dynamic: tuple[bool, bool], offset: float
) -> None:
    g = Rows()
    g.add("LayerNormalization", "x", *weights(shape[2]), axis=-1, epsilon=1e-5)
    x = values(*shape) + np.float32(offset)
    # Far from zero the mean's rounding shows, in ONNX Runtime as here.
    notes = g.check({"x": declared(shape, (*dynamic, False))}, {"x": x}, machine, 1e-5 if offset == 0 else 2e-4)
    assert "rows" in notes.rules.values()


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(
    shape=shapes,
    dynamic=st.tuples(*[st.booleans()] * 3),
    operator=st.sampled_from(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"]),
    axes=st.sampled_from([[-1], [1, 2], [0, 1, 2], [1], [0], [0, 1]]),
    keep=st.integers(0, 1),
)
def test_reductions_over_any_axes(
    machine: Machine,
    shape: tuple[int, int, int],
    dynamic: tuple[bool, bool, bool],
    operator: str,
    axes: list[int],
    keep: int,
) -> None:
    g = Rows()
    g.add(operator, "x", np.array(axes), keepdims=keep)
    g.check({"x": declared(shape, dynamic)}, {"x": values(*shape)}, machine)


@pytest.mark.parametrize("dynamic", [False, True])
def test_work_around_a_normalization_is_done_in_its_kernel(dynamic: bool) -> None:
    g = Rows()
    total = g.add("Add", g.add("Mul", "x", np.float32(0.5)), "z")
    g.add("LayerNormalization", total, *weights(197), axis=-1)
    shape = declared((33, 197), (dynamic, False))
    notes = g.check({"x": shape, "z": shape}, {"x": values(33, 197), "z": values(33, 197, seed=2)}, WIDE)
    assert list(notes.rules.values()) == ["rows"]
    g = Rows()
    g.add("Relu", g.add("Mul", g.add("LayerNormalization", "x", *weights(197), axis=-1), np.float32(3)))
    notes = g.check({"x": shape}, {"x": values(33, 197)}, WIDE)
    assert list(notes.rules.values()) == ["rows"]


attentions = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "queries": st.sampled_from([1, 2, 3, 8, 16, 33]),
        "keys": st.one_of(st.integers(1, 50), st.just(129)),
        "depth": st.sampled_from([8, 16, 20, 32, 64]),
        "mask": st.sampled_from(["none", "keys", "full", "heads"]),
        "scale": st.sampled_from(["divide", "multiply", "query", "none"]),
        "dynamic": st.tuples(*[st.booleans()] * 3),
        "merged": st.booleans(),
    }
)


def attention(g: Rows, case: Mapping[str, Any], *, transposed_keys: bool = True) -> None:
    """(b, s, h * d) queries ``q``, (b, t, h * d) keys ``k`` and values ``v``, maybe a mask ``m``."""
    heads, depth, scale = case["heads"], case["depth"], np.float32(case["depth"] ** -0.5)
    split = np.array([0, 0, heads, depth])
    q, k, v = (g.add("Reshape", name, split) for name in "qkv")
    q = g.add("Transpose", q, perm=[0, 2, 1, 3])
    k = g.add("Transpose", k, perm=[0, 2, 3, 1])
    v = g.add("Transpose", v, perm=[0, 2, 1, 3])
    if case["scale"] == "query":
        q = g.add("Mul", q, scale)
    scores = g.add("MatMul", q, k)
    if case["scale"] in ("divide", "multiply"):
        divides = case["scale"] == "divide"
        scores = g.add("Div" if divides else "Mul", scores, np.float32(1) / scale if divides else scale)
    if case["mask"] != "none":
        scores = g.add("Add", scores, "m")
    mixed = g.add("Transpose", g.add("MatMul", g.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    if case["merged"]:
        g.add("Reshape", mixed, np.array([0, 0, heads * depth]))


def operands(case: Mapping[str, Any]) -> tuple[dict[str, Shape], dict[str, np.ndarray]]:
    """Declared shapes and values of the inputs; a quarter of the mask is minus infinity, and one whole row."""
    sizes = [case["batch"], case["queries"], case["keys"]]
    names = declared(sizes, case["dynamic"])
    width = case["heads"] * case["depth"]
    inputs: dict[str, Shape] = {"q": [names[0], names[1], width]}
    inputs |= {name: [names[0], names[2], width] for name in "kv"}
    feeds = {"q": values(sizes[0], sizes[1], width, seed=1)}
    feeds |= {name: values(sizes[0], sizes[2], width, seed=i) for i, name in enumerate("kv", start=2)}
    kinds = {"keys": [0, None, None, 2], "full": [0, None, 1, 2], "heads": [None, case["heads"], 1, 2]}
    if case["mask"] != "none":
        axes = kinds[case["mask"]]
        static = case["heads"] if case["mask"] == "heads" else 1
        inputs["m"] = [
            static if a == case["heads"] and i == 1 else 1 if a is None else names[a] for i, a in enumerate(axes)
        ]
        shape = [static if i == 1 else 1 if a is None else sizes[a] for i, a in enumerate(axes)]
        mask = values(*shape, seed=5)
        mask[np.random.default_rng(6).random(shape) < 0.25] = -np.inf
        mask[..., 0] = 0
        mask[0, 0, 0, :] = -np.inf if case["queries"] == 3 else mask[0, 0, 0, :]
        feeds["m"] = mask
    return inputs, feeds


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(case=attentions)
def test_attention_is_one_kernel_without_transpositions(machine: Machine, case: Mapping[str, Any]) -> None:
    g = Rows()
    attention(g, case)
    notes = g.check(*operands(case), machine)
    assert list(notes.rules.values()).count("attention") == 1
    assert not [name for name in notes.rules if "transpose" in name or "matmul" in name]


def test_heads_of_a_linear_layer_go_into_attention_and_out_of_it_as_they_lie() -> None:
    g, size = Rows(), 64
    q, k, v = (g.add("MatMul", "x", values(size, size, scale=0.1, seed=i)) for i in range(3))
    case = {"heads": 2, "depth": 32, "scale": "divide", "mask": "none", "merged": True}
    inner = Rows()
    attention(inner, case)
    renamed = {"q": q, "k": k, "v": v}
    for node in inner.nodes:
        names = [renamed.get(name, f"a_{name}") for name in node.input]
        g.nodes.append(helper.make_node(node.op_type, names, [f"a_{node.output[0]}"]))
        g.nodes[-1].attribute.extend(node.attribute)
    g.weights += [numpy_helper.from_array(numpy_helper.to_array(w), f"a_{w.name}") for w in inner.weights]
    g.add("MatMul", f"a_{inner.nodes[-1].output[0]}", values(size, size, scale=0.1, seed=9))
    notes = g.check({"x": ["batch", "sequence", size]}, {"x": values(2, 19, size)}, WIDE)
    assert sorted(set(notes.rules.values()) - {"generic"}) == ["attention", "dense"]
    assert not [name for name in notes.rules if "transpose" in name]


products = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([(), (3,), (2, 1)]),
        "other": st.sampled_from([(), (3,), (1, 3), (2, 3)]),
        "m": st.integers(1, 40),
        "k": st.integers(1, 40),
        "n": st.one_of(st.integers(1, 70), st.just(197)),
        "dynamic": st.tuples(*[st.booleans()] * 3),
        "transposed": st.booleans(),
    }
)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(case=products)
def test_products_of_computed_operands_of_any_size_are_tiled(machine: Machine, case: Mapping[str, Any]) -> None:
    batch, other = case["batch"], case["other"]
    if any(1 not in pair and len(set(pair)) > 1 for pair in zip(batch[::-1], other[::-1], strict=False)):
        other = batch
    m, k, n = declared((case["m"], case["k"], case["n"]), case["dynamic"])
    sizes = [*other, case["n"], case["k"]] if case["transposed"] else [*other, case["k"], case["n"]]
    right: Shape = [*other, n, k] if case["transposed"] else [*other, k, n]
    g, last = Rows(), len(other)
    turned = g.add("Transpose", "b", perm=[*range(last), last + 1, last]) if case["transposed"] else "b"
    g.add("Relu", g.add("MatMul", "a", turned))
    feeds = {"a": values(*batch, case["m"], case["k"]), "b": values(*sizes, seed=1)}
    notes = g.check({"a": [*batch, m, k], "b": right}, feeds, machine)
    assert not notes.unscheduled
    assert case["n"] == 1 or set(notes.rules.values()) <= {"product", "matmul", "generic"}
