"""Indices that a caller gives at run time never reach memory outside of the tensor they point into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from test_aot_engine import build, model_of
from test_tvm_operators import MACHINE, agree, both, in_tvm, node_model
from tvm_support import compiled

from toolchain.native_engine import NativeEngine
from toolchain.tvm.graph.values import operator_of
from toolchain.tvm.importer import import_model
from toolchain.tvm.pipeline import PHASES, Notes

LINE = np.arange(10, dtype=np.float32)
TABLE = LINE.reshape(2, 5)
OUTSIDE = np.array([3, -1, 10, -11, 2**31 - 1, -(2**31)])
"""Two indices of ten elements, and four beyond either end."""
NEAREST = [3, 9, 9, 0, 9, 0]
PLACES = np.array([[1, -1], [2, 5], [-7, -9], [100, -100]])


def in_tvm_of_any_size(operator: str, inputs: Mapping[str, np.ndarray], **attrs: Any) -> list[np.ndarray]:
    """As :func:`in_tvm`, the first size of ``x`` unknown until run time."""
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype), ["n", *a.shape[1:]] if name == "x" else a.shape
        )
        for name, a in inputs.items()
    ]
    node = helper.make_node(operator, list(inputs), ["y"], name="n", **attrs)
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return compiled(onnx.shape_inference.infer_shapes(model), MACHINE)[0].run(list(inputs.values()))


@pytest.mark.parametrize("run", [in_tvm, in_tvm_of_any_size], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("operator", ["Gather", "GatherElements"])
def test_gathered_indices_outside_take_the_nearest_element(
    operator: str, dtype: str, run: Callable[..., list[np.ndarray]]
) -> None:
    (have,) = run(operator, {"x": LINE, "i": OUTSIDE.astype(dtype)})
    assert have.tolist() == NEAREST


@pytest.mark.parametrize("run", [in_tvm, in_tvm_of_any_size], ids=["fixed", "dynamic"])
def test_coordinates_outside_take_the_nearest_element(run: Callable[..., list[np.ndarray]]) -> None:
    (have,) = run("GatherND", {"x": TABLE, "i": PLACES})
    assert have.tolist() == [9, 9, 0, 5]


@pytest.mark.parametrize("run", [in_tvm, in_tvm_of_any_size], ids=["fixed", "dynamic"])
def test_scattered_indices_outside_write_to_the_nearest_element(run: Callable[..., list[np.ndarray]]) -> None:
    updates = -np.arange(1, 5, dtype=np.float32)
    (have,) = run("ScatterElements", {"x": LINE, "i": np.array([3, -1, 1000, -1000]), "u": updates})
    assert have.tolist() == [-4, 1, 2, -1, 4, 5, 6, 7, 8, -3]
    (have,) = run("ScatterND", {"x": TABLE, "i": PLACES, "u": updates})
    assert have.tolist() == [[-3, 1, 2, 3, 4], [-4, 6, 7, 8, -2]]


def test_a_constant_index_outside_does_not_read_beyond_the_tensor() -> None:
    (have,) = in_tvm("Gather", {"x": LINE, "i": np.array([0, 10])}, weights=("i",))
    assert have.tolist() == [0, 9]


def take_modes(indices: np.ndarray, weights: tuple[str, ...]) -> list[str]:
    """How the compile pipeline's fold phase leaves the gathers of ``LINE``."""
    from tvm import relax

    model, _ = node_model("Gather", {"x": LINE, "i": indices}, 1, weights, "", {})
    fold = next(phase for phase in PHASES if phase.name == "fold")
    module = import_model(model)
    with MACHINE.tvm_target():
        for step in fold.make(MACHINE, Notes()):
            module = step(module)
    found: list[str] = []
    relax.analysis.post_order_visit(
        module["main"], lambda e: found.append(str(e.attrs.mode)) if operator_of(e) == "relax.take" else None
    )
    return found


def test_constant_indices_inside_are_left_as_they_are() -> None:
    assert take_modes(np.array([0, 9, -1]), ("i",)) == ["fast"]
    assert set(take_modes(np.array([0, 9, -1]), ())) == {"wrap", "clip"}  # the former reads a size


def test_an_image_outside_of_the_batch_is_the_last_one() -> None:
    images = np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32)
    rois = np.array([[0, 0, 3, 3]] * 4, np.float32)
    (have,) = in_tvm(
        "RoiAlign", {"x": images, "r": rois, "b": np.array([0, 1, 100, -100])}, output_height=2, output_width=2
    )
    np.testing.assert_array_equal(have[2], have[1])
    np.testing.assert_array_equal(have[3], have[0])


def test_a_sequence_longer_than_its_tensor_is_turned_as_a_whole() -> None:
    (have,) = in_tvm("ReverseSequence", {"x": LINE.reshape(5, 2), "l": np.array([2, 50])})
    assert have.T.tolist() == [[2, 0, 4, 6, 8], [9, 7, 5, 3, 1]]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_negative_indices_count_from_the_end_as_in_onnx_runtime(axis: int) -> None:
    size = TABLE.shape[axis]
    indices = np.arange(-size, size)
    agree(both("Gather", {"x": TABLE, "i": indices.reshape(2, -1)}, axis=axis))
    along = np.stack([indices] * (5 if axis == 0 else 2), axis=1 if axis == 0 else 0)
    agree(both("GatherElements", {"x": TABLE, "i": along}, axis=axis))
    agree(
        both(
            "ScatterElements",
            {"x": TABLE, "i": along[:size, :size], "u": along[:size, :size].astype(np.float32)},
            axis=axis,
        )
    )


@pytest.mark.parametrize("rows", [10, "n"], ids=["fixed", "dynamic"])
def test_engines_ahead_of_time_read_no_foreign_memory_either(tmp_path: Path, rows: int | str) -> None:
    inputs = {"x": (onnx.TensorProto.FLOAT, [rows]), "i": (onnx.TensorProto.INT64, [len(NEAREST)])}
    node = helper.make_node("Gather", ["x", "i"], ["y"], name="n")
    build(model_of([node], inputs, {"y": (onnx.TensorProto.FLOAT, [len(NEAREST)])}), tmp_path / "m.so")
    (have,) = NativeEngine(tmp_path / "m.so", 1).run([LINE, OUTSIDE])
    assert have.tolist() == NEAREST
