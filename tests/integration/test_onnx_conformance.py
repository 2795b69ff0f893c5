"""A part of the official ONNX backend tests through TVM: nothing is wrong or crashes, and what passed still does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "onnx_conformance.py"

PASSING = (
    "GRU", "LSTM", "RNN", "Loop", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RotaryEmbedding",
    "Celu", "Swish", "IsInf", "SpaceToDepth", "DepthToSpace", "ConvTranspose", "Resize", "ReduceMax", "ReduceL2",
    "ReduceLogSumExp", "CumSum", "Gather", "GatherElements", "ScatterElements", "Col2Im",
)  # fmt: skip
"""Operators of which every case of the inference core passes."""

MIXED = ("Slice", "Shape", "TopK", "NonMaxSuppression", "RoiAlign", "Pad", "Identity", "DequantizeLinear")
"""Operators of which some cases are refused."""


@pytest.mark.slow
def test_backend_tests_of_chosen_operators_pass_or_are_refused(tmp_path: Path) -> None:
    chosen = [part for operator in (*PASSING, *MIXED) for part in ("--operator", operator)]
    result = tmp_path / "result.json"
    # The package's own warnings, of its cases and of forking, are no failures.
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--core", "--json", str(result), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(result.read_text())
    assert len(rows) > 150
    assert [r for r in rows if r["status"] in ("wrong", "crashed")] == []
    missed = {r["name"]: r["reason"] for r in rows if r["operator"] in PASSING and r["status"] == "refused"}
    assert missed == {}
    assert all(r["reason"] for r in rows if r["status"] == "refused")
