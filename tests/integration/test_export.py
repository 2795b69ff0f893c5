"""Exports of small models that each hold one difficulty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_support import BATCH, IMAGE, export_model

from toolchain.specs import DimSpec, InputSpec

X4 = InputSpec("x", "float32", ("batch", 4))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 5])
def test_cnn_agrees_with_the_original_at_other_batch_sizes_in_eval_mode(tmp_path: Path, batch: int) -> None:
    exported = export_model(tmp_path, "cnn", inputs=(IMAGE,), dims=(BATCH,))
    image = normal(batch, 1, 8, 8)
    got, expected = exported.outputs(image=image), exported.original(tmp_path, image=image)
    assert list(got) == ["output"]
    np.testing.assert_allclose(got["output"], expected["output"], atol=1e-5)
    assert not {"BatchNormalization", "Dropout"} & set(exported.facts["operators"])


def test_facts_and_contract_describe_inputs_outputs_and_dims(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "cnn", inputs=(IMAGE,), dims=(BATCH,), outputs=("logits",), preprocessing="0..1")
    assert exported.contract == {
        "schema": 1,
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8], "pad": None}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
        "dims": {"batch": {"min": 1, "max": 64, "batch": True, "buckets": []}},
        "preprocessing": "0..1",
    }
    facts = exported.facts
    assert facts["opset"] == 18
    assert facts["parameters"] == 8 * 9 + 8 + 8 * 10 + 10
    assert facts["bytes"] == (exported.folder / "model.onnx").stat().st_size
    assert facts["nodes"] == sum(facts["operators"].values())
    assert 0 <= facts["max_abs_error"] < 1e-5
    assert facts["checked_sizes"] == 3


def test_two_inputs_are_bound_by_name_whatever_their_declared_order(tmp_path: Path) -> None:
    inputs = (
        InputSpec("scale", "float32", (1,)),
        InputSpec("weight", "float32", ("batch", 3)),
        InputSpec("ids", "int64", ("batch", 3), low=0, high=49),
    )
    exported = export_model(tmp_path, "two_inputs", inputs=inputs, dims=(BATCH,))
    assert [i.name for i in onnx.load(exported.folder / "model.onnx").graph.input] == ["scale", "weight", "ids"]
    declared = {"name": "ids", "dtype": "int64", "shape": ["batch", 3], "pad": None, "low": 0, "high": 49}
    assert exported.contract["inputs"][2] == declared
    values = {"scale": normal(1), "weight": normal(4, 3), "ids": np.arange(12).reshape(4, 3)}
    np.testing.assert_allclose(
        exported.outputs(**values)["output"], exported.original(tmp_path, **values)["output"], atol=1e-5
    )


def test_dict_outputs_are_named_by_their_keys(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "dict_out", inputs=(X4,), dims=(BATCH,))
    names = [o["name"] for o in exported.contract["outputs"]]
    x = normal(3, 4)
    expected = exported.original(tmp_path, x=x)
    assert sorted(names) == ["best", "extra_left", "logits"]
    assert list(expected) == names
    for name, array in exported.outputs(x=x).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_a_named_output_selects_it_and_drops_what_only_the_others_need(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "dict_out", inputs=(X4,), dims=(BATCH,), outputs=("extra_left",))
    assert [o["name"] for o in exported.contract["outputs"]] == ["extra_left"]
    assert exported.facts["operators"] == {"Gemm": 1}
    assert exported.facts["parameters"] == 4 * 2 + 2


def test_nested_repeated_passed_through_and_constant_outputs(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "nested", inputs=(X4,), dims=(BATCH,))
    x = normal(3, 4)
    got = exported.outputs(x=x)
    expected = {
        "output_0": x * 2,
        "output_1_0": x + 1,
        "output_1_1_k": x - 1,
        "output_2": x * 2,
        "output_3": x,
        "output_4": np.ones(2, np.float32),
    }
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=1e-6)


def test_lstm_with_dynamic_batch(tmp_path: Path) -> None:
    spec = InputSpec("x", "float32", ("batch", 6, 5))
    exported = export_model(tmp_path, "lstm", inputs=(spec,), dims=(BATCH,), outputs=("last", "hidden"))
    x = normal(1, 6, 5)
    expected = exported.original(tmp_path, x=x)
    for name, array in exported.outputs(x=x).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
    assert exported.contract["outputs"][0]["shape"] == ["batch", 7]


def test_transformer_keeps_batch_and_sequence_dynamic_and_leaves_training_mode(tmp_path: Path) -> None:
    inputs = (
        InputSpec("ids", "int64", ("batch", "sequence"), low=0, high=99),
        InputSpec("mask", "int64", ("batch", "sequence"), low=1, high=1),
    )
    dims = (BATCH, DimSpec("sequence", 1, 40))
    exported = export_model(tmp_path, "transformer", inputs=inputs, dims=dims, outputs=("embedding",))
    values = {"ids": np.arange(33).reshape(3, 11), "mask": np.ones((3, 11), np.int64)}
    values["mask"][:, 7:] = 0
    np.testing.assert_allclose(
        exported.outputs(**values)["embedding"], exported.original(tmp_path, **values)["embedding"], atol=1e-5
    )
    assert exported.contract["outputs"] == [{"name": "embedding", "dtype": "float32", "shape": ["batch", 16]}]
    assert exported.facts["checked_sizes"] == 5


def test_an_output_named_like_an_internal_value_or_the_input_of_another_node(tmp_path: Path) -> None:
    plain = export_model(tmp_path / "plain", "clash", inputs=(X4,), dims=(BATCH,))
    internal = next(n for n in onnx.load(plain.folder / "model.onnx").graph.node if n.op_type == "Relu").output[0]
    exported = export_model(tmp_path / "named", "clash", inputs=(X4,), dims=(BATCH,), outputs=(internal,))
    x = normal(2, 4)
    hidden = np.maximum(x, 0)
    np.testing.assert_allclose(exported.outputs(x=x)[internal], 1 / (1 + np.exp(-hidden)) + hidden, atol=1e-6)


def test_an_input_renamed_to_the_name_of_an_internal_value(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "clash", inputs=(InputSpec("relu", "float32", ("batch", 4)),), dims=(BATCH,))
    x = normal(2, 4)
    hidden = np.maximum(x, 0)
    np.testing.assert_allclose(exported.outputs(relu=x)["output"], 1 / (1 + np.exp(-hidden)) + hidden, atol=1e-6)


def test_the_bytes_do_not_depend_on_the_folder_and_hold_no_path(tmp_path: Path) -> None:
    options = {"inputs": (IMAGE,), "dims": (BATCH,)}
    first = export_model(tmp_path / "one", "cnn", **options)
    second = export_model(tmp_path / "another" / "place", "cnn", **options)
    data = (first.folder / "model.onnx").read_bytes()
    assert data == (second.folder / "model.onnx").read_bytes()
    assert (first.folder / "contract.json").read_bytes() == (second.folder / "contract.json").read_bytes()
    for word in (b"/", b"models.py", b"pkg.", b"stack_trace"):
        assert word not in b"".join(_strings(first.folder / "model.onnx")), word
    assert first.facts == second.facts


def _strings(path: Path) -> list[bytes]:
    """Everything in the model but the weights' numbers."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return [str(model).encode()]


def test_shapes_are_derived_from_example_inputs(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "cnn", example_inputs="nets/models.py:cnn_example")
    assert exported.contract["inputs"] == [{"name": "image", "dtype": "float32", "shape": [3, 1, 8, 8], "pad": None}]
    assert exported.contract["dims"] == {}


def test_example_inputs_with_declared_dynamic_shapes(tmp_path: Path) -> None:
    exported = export_model(
        tmp_path, "cnn", example_inputs="nets/models.py:cnn_example", inputs=(IMAGE,), dims=(BATCH,)
    )
    assert exported.outputs(image=normal(7, 1, 8, 8))["output"].shape == (7, 10)


def test_a_dimension_with_one_size_is_fixed(tmp_path: Path) -> None:
    dims = (DimSpec("batch", 4, 4, batch=True),)
    exported = export_model(tmp_path, "cnn", inputs=(IMAGE,), dims=dims)
    graph = onnx.load(exported.folder / "model.onnx").graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [4, 1, 8, 8]
    assert exported.contract["inputs"][0]["shape"] == ["batch", 1, 8, 8]


def test_large_weights_go_to_a_data_file_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir

    from toolchain.export.clean import save

    exported = export_model(tmp_path, "cnn", inputs=(IMAGE,), dims=(BATCH,))
    (tmp_path / "split").mkdir()
    path = tmp_path / "split" / "model.onnx"
    save(ir.load(exported.folder / "model.onnx"), path, external_limit=100)
    assert (tmp_path / "split" / "model.onnx.data").stat().st_size >= 8 * 9 * 4
    onnx.checker.check_model(str(path), full_check=True)
    locations = {e.value for t in onnx.load(path, load_external_data=False).graph.initializer for e in t.external_data
                 if e.key == "location"}  # fmt: skip
    assert locations == {"model.onnx.data"}
