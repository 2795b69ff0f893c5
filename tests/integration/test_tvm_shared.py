"""Layers that differ in their numbers alone share one loop nest, and compute what they did."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qdq_support import Qdq, as_defined
from test_tvm_int8 import FEATURES, MACHINES, RUNNABLE
from tvm_support import compiled

pytestmark = pytest.mark.skipif("avx2" not in FEATURES, reason="these tests run AVX2 code on this machine")
LAYERS = [(0.08, 120), (0.21, 90), (0.5, 77), (1.1, 130)]


def stack(layers: list[tuple[float, int]], rows: int | str, activation: str = "uint8") -> onnx.ModelProto:
    """Products of 32 columns, one behind the other; ``layers``: scale and zero point of each one's output."""
    q = Qdq([5, 32], activation)
    value = q.quantized("x", 0.04, 100)
    for i, (scale, zero) in enumerate(layers):
        weights, _ = q.weights(32, 32, axis=1)
        value = q.add("MatMul", value, weights)
        value = q.quantized(value, scale, zero) if i < len(layers) - 1 else value
    return q.model(q.add("QuantizeLinear", value, *q.parameters(*layers[-1])), shape=[rows, 32])


@pytest.mark.parametrize("machine", RUNNABLE)
@pytest.mark.parametrize("rows", [5, "rows"])
def test_quantized_layers_of_one_shape_are_one_loop_nest(machine: str, rows: int | str, tmp_path: Path) -> None:
    model = stack(LAYERS, rows)
    library, notes = compiled(model, MACHINES[machine], tmp_path)
    # The first one reads what it quantizes itself, in the same form.
    assert sum("dense" in name for name in notes.rules) == 1
    (dump,) = tmp_path.glob("*-schedule.py")
    assert dump.read_text().count("cls.fused_dense") == len(LAYERS)
    for count in (5,) if rows == 5 else (1, 5, 17):
        x = np.random.default_rng(count).standard_normal((count, 32)).astype(np.float32) * 3
        [have], [want] = library.run([x]), as_defined(model, x)
        assert len(np.unique(want)) > 3
        assert np.abs(have.astype(int) - want.astype(int)).max() <= len(LAYERS)


def test_what_all_agree_in_stays_a_constant_of_the_code(tmp_path: Path) -> None:
    _, notes = compiled(stack(LAYERS, 5), MACHINES[RUNNABLE[0]], tmp_path)
    (dump,) = tmp_path.glob("*-fuse.py")
    # The zero point, less the constant that rounds; the scale is among the constants of the columns already.
    assert "numbers: T.Buffer((T.int64(1),)" in dump.read_text()
    same = [(scale, 128) for scale, _ in LAYERS]
    _, notes = compiled(stack(same, 5), MACHINES[RUNNABLE[0]], tmp_path / "same")
    (dump,) = (tmp_path / "same").glob("*-fuse.py")
    assert sum("dense" in name for name in notes.rules) == 1
    assert "numbers: T.Buffer" not in dump.read_text()


def scaled_and_bounded(factors: list[float], bounds: list[float]) -> onnx.ModelProto:
    """Outputs max(exp(x_i * factor), bound), for inputs x_i."""
    nodes, constants, inputs, outputs = [], [], [], []
    for i, numbers in enumerate(zip(factors, bounds, strict=True)):
        constants += [numpy_helper.from_array(np.array(n, np.float32), f"c{i}{j}") for j, n in enumerate(numbers)]
        nodes += [
            helper.make_node("Mul", [f"x{i}", f"c{i}0"], [f"m{i}"]),
            helper.make_node("Exp", [f"m{i}"], [f"e{i}"]),
            helper.make_node("Clip", [f"e{i}", f"c{i}1"], [f"y{i}"]),
        ]
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [3, 37]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [3, 37]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(("bounds", "nests"), [([0.5, 0.5], 1), ([0.5, 0.7], 2)])
def test_bounds_are_not_taken_out_so_that_nan_stays_nan(bounds: list[float], nests: int) -> None:
    model = scaled_and_bounded([0.3, -1.7], bounds)
    library, notes = compiled(model, MACHINES[RUNNABLE[0]])
    assert len(notes.rules) == nests
    feeds = {f"x{i}": np.random.default_rng(i).standard_normal((3, 37)).astype(np.float32) for i in range(2)}
    feeds["x0"][1, 5] = feeds["x1"][0, 36] = np.nan
    for have, want in zip(library.run(list(feeds.values())), as_defined(model, feeds), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-6)
        assert np.isnan(have).sum() == 1


def test_two_builds_give_the_same_code() -> None:
    """With names in order of calls: the order of functions in a module depends on addresses."""
    bodies = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            compiled(stack(LAYERS, "rows"), MACHINES[RUNNABLE[0]], Path(folder))
            bodies.append([path.read_text() for path in sorted(Path(folder).glob("*.py"))])
    assert bodies[0] == bodies[1]
