"""Datasets: normalising what users yield, checks, bytes, limits and random inputs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.data import (
    Batch,
    limited,
    normalise,
    read_batches,
    read_outputs,
    write_batches,
    write_npz,
    write_outputs,
)
from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec, Signature
from toolchain.stage import StageContext
from toolchain.stages import data

X = InputSpec("x", "float32", ("batch", 3))
IDS = InputSpec("ids", "int64", ("batch", "sequence"), low=0, high=9)
DIMS = (DimSpec("batch", 1, 8, batch=True), DimSpec("sequence", 2, 16))
ONE = Signature.of([X], DIMS)
TWO = Signature.of([X, IDS], DIMS)


def x(rows: int = 2) -> np.ndarray:
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


def ids(rows: int = 2, length: int = 4) -> np.ndarray:
    return np.ones((rows, length), np.int64)


def run_data(tmp_path: Path, code: str, *, signature: Signature = ONE, **options: Any) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text("import numpy as np\n" + code)
    made = data.Options("mine.py:batches", "evaluation", inputs=signature.inputs, dims=DIMS, **options)
    out = tmp_path / "out"
    out.mkdir()
    return data.run(StageContext({}, made, out, tmp_path)).facts


def data_error(tmp_path: Path, code: str, **options: Any) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        run_data(tmp_path, code, **options)
    return caught.value


def test_a_dict_an_array_and_pairs_with_labels_are_taken() -> None:
    assert normalise(x(), ONE, 0).labels == {}
    assert normalise({"x": x()}, ONE, 0).size == 2
    pair = normalise((x(), [1, 0]), ONE, 0)
    assert pair.labels["label"].tolist() == [1, 0]
    named = normalise([{"ids": ids(), "x": x()}, {"kind": np.array(["a", "b"])}], TWO, 0)
    assert list(named.inputs) == ["x", "ids"]
    assert named.labels["kind"].tolist() == ["a", "b"]
    assert normalise(((x(), ids()), 1), TWO, 0).inputs["ids"].shape == (2, 4)


def test_python_lists_become_float32() -> None:
    assert normalise({"x": [[0.5, 1.0, 2.0]]}, ONE, 0).inputs["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("item", "signature", "message"),
    [
        ({"x": x().astype(np.float64)}, ONE, "got float64[2,3]; declared float32[batch,3]"),
        ({"x": x()[0]}, ONE, "with 1 axes"),
        ({"x": x()[:, :2]}, ONE, "axis 1 must be 3"),
        ({"x": x(9)}, ONE, "'batch' is 9; allowed: 1 to 8"),
        ({"x": x(0)}, ONE, "'batch' is 0"),
        ({"y": x()}, ONE, "unknown input 'y'"),
        ({"x": x()}, TWO, "input 'ids' is missing"),
        ({"x": x(2), "ids": ids(3)}, TWO, "'batch' is 3, but 2 in another input"),
        ({"x": x(), "ids": ids() * 10}, TWO, "got values from 10 to 10; declared: low = 0, high = 9"),
        ({"x": np.full((1, 3), np.nan, np.float32)}, ONE, "3 of 3 values are NaN"),
        ({"x": [object()]}, ONE, "Python objects"),
        (x(), TWO, "allowed: a dict by input name (x, ids)"),
        ((x(), 1, 2), ONE, "a tuple of 3 elements"),
    ],
)
def test_a_wrong_batch_says_which_batch_and_what_is_allowed(item: Any, signature: Signature, message: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        normalise(item, signature, 7)
    assert message in caught.value.what
    assert caught.value.where.startswith("batch 7")
    assert caught.value.code is ExitCode.USER_CODE


def test_torch_tensors_are_taken_and_bfloat16_is_refused() -> None:
    torch = pytest.importorskip("torch")
    assert normalise(torch.zeros(2, 3, requires_grad=True), ONE, 0).inputs["x"].shape == (2, 3)
    with pytest.raises(ToolchainError, match="bfloat16"):
        normalise(torch.zeros(2, 3, dtype=torch.bfloat16), ONE, 0)


def test_datasets_and_references_come_back_as_written(tmp_path: Path) -> None:
    batches = [Batch({"x": x(2)}, {"label": np.array([1, 2])}, 2), Batch({"x": x(1)}, {"label": np.array([3])}, 1)]
    summary = write_batches(tmp_path, iter(batches))
    assert (summary["batches"], summary["samples"]) == (2, 3)
    assert json.loads((tmp_path / "dataset.json").read_text()) == summary
    again = list(read_batches(tmp_path))
    assert [b.size for b in again] == [2, 1]
    np.testing.assert_array_equal(again[0].inputs["x"], x(2))
    np.testing.assert_array_equal(again[1].labels["label"], [3])
    write_outputs(tmp_path, [{"b": x(1), "a": x(2)}])
    assert [list(outputs) for outputs in read_outputs(tmp_path)] == [["b", "a"]]


def test_npz_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    arrays = {"input:x": x(), "input:t": np.asfortranarray(x(4)), "label:l": np.float32(3), "s": np.array(["a"])}
    write_npz(tmp_path / "a.npz", arrays)
    time.sleep(2.1)  # zip time stamps count in steps of two seconds
    write_npz(tmp_path / "b.npz", {**arrays, "input:t": np.ascontiguousarray(arrays["input:t"])})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as file:
        assert file["label:l"].shape == ()
        np.testing.assert_array_equal(file["input:t"], x(4))


def test_a_limit_counts_samples_and_cuts_the_last_batch_with_its_labels(tmp_path: Path) -> None:
    code = "def batches():\n    for i in range(9):\n        yield np.full((4, 3), i, np.float32), np.arange(4)\n"
    facts = run_data(tmp_path, code, limit=10)
    assert facts == {
        "batches": 3, "samples": 10, "inputs": ["x"], "labels": ["label"], "role": "evaluation", "random": False,
    }  # fmt: skip
    last = list(read_batches(tmp_path / "out" / "dataset"))[-1]
    assert last.inputs["x"].shape == (2, 3)
    assert last.labels["label"].tolist() == [0, 1]


def test_a_limit_stops_the_users_function() -> None:
    seen = []

    def endless() -> Any:
        while True:
            seen.append(1)
            yield Batch({"x": x(4)}, {}, 4)

    assert sum(batch.size for batch in limited(endless(), ONE, 8)) == 8
    assert len(seen) == 2


def test_no_batches_is_an_error_that_names_the_function(tmp_path: Path) -> None:
    error = data_error(tmp_path, "def batches():\n    return []\n")
    assert error.what == "yielded no batches"
    assert error.where == "data.evaluation = 'mine.py:batches'"
    assert error.code is ExitCode.USER_CODE


def test_a_wrong_batch_of_a_function_names_function_batch_and_input(tmp_path: Path) -> None:
    code = "def batches():\n    yield np.zeros((1, 3), np.float32)\n    yield np.zeros((1, 3))\n"
    error = data_error(tmp_path, code)
    assert error.where == "data.evaluation = 'mine.py:batches', batch 1, input 'x'"


def test_an_error_while_yielding_names_the_line(tmp_path: Path) -> None:
    code = "def batches():\n    yield np.zeros((1, 3), np.float32)\n    {}['gone']\n"
    error = data_error(tmp_path, code)
    assert "KeyError" in error.what
    assert "mine.py:4" in error.where
    assert error.code is ExitCode.USER_CODE


def test_a_function_that_returns_a_dict_of_all_data_is_told_to_yield(tmp_path: Path) -> None:
    error = data_error(tmp_path, "def batches():\n    return {'x': np.zeros((1, 3), np.float32)}\n")
    assert "returned dict" in error.what
    assert "yield" in error.hint


def random_dataset(tmp_path: Path, signature: Signature, limit: int | None = None) -> list[Batch]:
    out = tmp_path / f"random-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    options = data.Options("", "random", limit, signature.inputs, tuple(signature.dims.values()))
    facts = data.run(StageContext({}, options, out, tmp_path)).facts
    assert facts["random"] is True
    assert facts["samples"] == (limit or 16)
    return list(read_batches(out / "dataset"))


def test_random_data_is_seeded_varies_sizes_and_keeps_ranges(tmp_path: Path) -> None:
    first, second = random_dataset(tmp_path, TWO), random_dataset(tmp_path, TWO)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.inputs["x"], b.inputs["x"])
        assert a.inputs["ids"].shape[0] == a.inputs["x"].shape[0] == a.size
    values = np.concatenate([batch.inputs["ids"].ravel() for batch in first])
    assert values.min() >= 0
    assert values.max() <= 9
    assert len({batch.inputs["ids"].shape[1] for batch in first}) > 1
    assert {batch.size for batch in first} >= {1, 2}
    for batch in first:
        normalise(batch.inputs, TWO, 0)


def test_random_data_of_a_model_without_dynamic_sizes_is_sixteen_batches(tmp_path: Path) -> None:
    fixed = Signature.of([InputSpec("x", "float32", (1, 3), low=2, high=3)], ())
    batches = random_dataset(tmp_path, fixed)
    assert len(batches) == 16
    assert all(2 <= batch.inputs["x"].min() <= batch.inputs["x"].max() <= 3 for batch in batches)


def test_example_sizes_are_distinct_and_not_one() -> None:
    sizes = TWO.example_sizes()
    assert sizes["batch"] == 2
    assert sizes["sequence"] == 8
    assert TWO.check_sizes()[1:] == [
        {"batch": 1, "sequence": 8},
        {"batch": 3, "sequence": 8},
        {"batch": 2, "sequence": 2},
        {"batch": 2, "sequence": 9},
    ]
    tight = Signature.of([IDS], (DimSpec("batch", 2, 2), DimSpec("sequence", 2, 2)))
    assert tight.check_sizes() == [{"batch": 2, "sequence": 2}]


@pytest.mark.parametrize("stage", ["data", "export", "reference", "optimize"])
def test_stage_modules_import_nothing_heavy(stage: str) -> None:
    import subprocess
    import sys

    code = (
        f"import sys, toolchain.stages.{stage}; "
        "print([m for m in ('numpy', 'torch', 'onnx', 'onnxruntime', 'onnx_ir') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
