"""Changes of layout in square tiles: values as numpy has them, for several vector widths; shuffles do the work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tvm_support import Graph, compiled

from toolchain.host import detect_host
from toolchain.tvm.machine import Machine

HOST = detect_host()
PLAIN = {"kind": "llvm", "mtriple": f"{HOST.arch}-linux-gnu"}
MACHINES = {bits: Machine(PLAIN, "cpu", HOST.arch, bits, 32 if bits == 512 else 16) for bits in (128, 256, 512)}
EXAMPLES = settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}

widths = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())


def model_of(graph: Graph, result: str, shape: list[int | str], dtype: str = "float32") -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", DTYPES[dtype], shape)]
    outputs = [helper.make_tensor_value_info(result, DTYPES[dtype], None)]
    made = helper.make_graph(graph.nodes, "model", inputs, outputs, graph.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@widths
@EXAMPLES
@given(
    sizes=st.lists(st.sampled_from([1, 3, 4, 7, 8, 16, 20, 33, 48]), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_any_order_of_axes_of_any_size(machine: Machine, sizes: list[int], order: list[int], dtype: str) -> None:
    g = Graph()
    model = model_of(g, g.add("Transpose", "x", perm=order), list(sizes), dtype)
    library, _ = compiled(model, machine)
    x = np.random.default_rng(1).integers(0, 255, sizes).astype(dtype)
    (got,) = library.run([x])
    np.testing.assert_array_equal(got, x.transpose(order))


@widths
@pytest.mark.parametrize("size", [(16, 16), (9, 14)], ids=str)
def test_reshapes_sums_and_padding_around_them(machine: Machine, size: tuple[int, int]) -> None:
    g = Graph()
    rows, columns = size
    pads = g.constant(np.array([0, 0, 1, 0, 0, 0, 2, 3]))
    x = g.add("Transpose", g.add("Pad", "x", pads), perm=[0, 2, 3, 1])
    x = g.add("Reshape", g.add("Relu", g.add("Add", x, g.weight(32))), g.constant(np.array([0, -1, 32])))
    x = g.add("Transpose", x, perm=[0, 2, 1])
    x = g.add("Mul", g.add("Mul", x, g.add("ReduceMax", "x", keepdims=0)), g.weight(32, 1))
    model = model_of(g, x, ["n", 32, rows, columns])
    library, _ = compiled(model, machine)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 32, rows, columns)).astype(np.float32)
        (got,), (want,) = library.run([x]), session.run(None, {"x": x})
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tiles_are_turned_by_shuffles_of_two_vectors(tmp_path: Path) -> None:
    g = Graph()
    model = model_of(g, g.add("Transpose", "x", perm=[0, 2, 1]), [1, 48, 50])
    compiled(model, MACHINES[512], tmp_path)
    (scheduled,) = tmp_path.glob("*-schedule.py")
    assert scheduled.read_text().count("T.Shuffle(") == 16 * 4
