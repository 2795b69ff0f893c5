"""What a bundle keeps to check itself with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.data import Batch, write_batches, write_outputs
from toolchain.stage import StageContext
from toolchain.stages import selftest

X = np.arange(32, dtype=np.float32).reshape(8, 4) % 3


@pytest.mark.parametrize(
    ("shape", "output", "rows"),
    [
        (["batch", 4], X * 2, 2),
        ([None, 2], np.argwhere(X), 8),
        ([4], X.sum(0), 8),
        ([], X.sum(), 8),
    ],
    ids=["samples", "as many as values say", "over all samples", "one number"],
)
def test_samples_are_cut_only_where_every_output_is_cut_along(
    tmp_path: Path, shape: list[Any], output: np.ndarray, rows: int
) -> None:
    contract = {
        "schema": 1,
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "pad": None}],
        "outputs": [{"name": "y", "dtype": str(output.dtype), "shape": shape}],
        "dims": {"batch": {"min": 1, "max": 64, "batch": True, "buckets": []}},
    }
    inputs = {name: tmp_path / name for name in ("onnx", "evaluation", "reference")}
    for folder in inputs.values():
        folder.mkdir()
    (inputs["onnx"] / "contract.json").write_text(json.dumps(contract))
    write_batches(inputs["evaluation"], [Batch({"x": X}, {})])
    write_outputs(inputs["reference"], [{"y": np.asarray(output)}])
    (tmp_path / "out").mkdir()
    selftest.run(StageContext(inputs, selftest.Options(), tmp_path / "out", tmp_path))
    with np.load(tmp_path / "out" / "selftest" / "selftest.npz") as arrays:
        np.testing.assert_array_equal(arrays["input:x"], X[:rows])
        np.testing.assert_array_equal(arrays["output:y"], output[:rows] if shape[:1] == ["batch"] else output)
