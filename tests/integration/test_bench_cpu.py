"""The CPU benchmark runs, and its figures are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_cpu.py"), "--model", "digits", "--precision", "fp32"]
    command += ["--threads", "1", "--rounds", "3", "--contenders", "ours,onnxruntime", "--peak"]
    command += ["--work", str(folder / "work"), "--json", str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    assert "geometric mean of ours/ort over 1 models" in done.stdout
    answer: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return answer


def test_every_contender_is_timed_in_each_round_and_the_outputs_agree(results: dict[str, Any]) -> None:
    (line,) = results["speed"]
    assert line["model"] == "digits"
    assert line["missing"] == {}
    for clock in ("cpu_ms", "wall_ms"):
        assert {name: len(times) for name, times in line[clock].items()} == {"ours": 3, "onnxruntime": 3}
    assert line["max_abs_error"]["ours"] < 1e-3
    ratios = sorted(a / b for a, b in zip(line["cpu_ms"]["ours"], line["cpu_ms"]["onnxruntime"], strict=True))
    assert line["ratio"] == pytest.approx(ratios[1])


def test_flops_are_those_of_the_definition_and_below_the_peak(results: dict[str, Any]) -> None:
    (line,) = results["speed"]
    convolutions = 64 * 9 * (1 * 16 + 16 * 32) + 16 * 9 * 32 * 64
    assert line["gflops"] * 1e9 == 2 * (convolutions + 256 * 64 + 64 * 10)
    assert 0 < line["of_peak"] < 1
    assert results["peak"]["gflops"] > 1


def test_the_build_is_split_into_its_steps_and_the_library_into_code_and_weights(results: dict[str, Any]) -> None:
    (line,) = results["costs"]
    assert {"import", "fuse", "codegen", "link"} <= line["cpu_s"].keys()
    assert all(seconds >= 0 for seconds in line["cpu_s"].values())
    assert 0 < line["code_bytes"] < line["library_bytes"]
    assert line["weight_bytes"] >= 4 * 40_000
    assert line["ours_peak_mb"] > 0
    assert line["onnxruntime_peak_mb"] > 0
