"""The edge benchmark itself, on the smallest model: it runs, and what it prints is consistent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the benchmark prints for the digits model, and its JSON."""
    folder = tmp_path_factory.mktemp("bench-edge")
    command = [
        sys.executable, "benchmarks/bench_edge.py", "--model", "digits", "--profile", "cortex-a76", "--rounds", "1",
        "--runs", "3", "--work", str(folder), "--json", str(folder / "figures.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(Path(command[-1]).read_text())


def test_every_line_has_figures_of_both_runtimes(printed: tuple[str, dict[str, Any]]) -> None:
    text, figures = printed
    assert not [row for part in ("sizes", "native", "instructions") for row in figures[part] if "refused" in row]
    for row in figures["native"]:
        for runtime in ("ours", "onnxruntime"):
            assert row[runtime]["median_ms"] > 0
            assert 0 < row[runtime]["start_cpu_ms"] < 10_000
    assert [row["ours"] > 0 and row["onnxruntime"] > 0 for row in figures["instructions"]] == [True, True]
    assert "no times" in text, "counts under emulation are not labelled"


def test_the_runtime_is_within_its_size_and_a_bundle_holds_engine_and_runtime(
    printed: tuple[str, dict[str, Any]],
) -> None:
    _, figures = printed
    assert [row["profile"] for row in figures["sizes"]] == ["cortex-a76", "x86-64-v3"] * 2
    for row in figures["sizes"]:
        assert all(size <= 100_000 for size in row["runtime_bytes"].values())
        assert row["bundle_bytes"] > row["engine_bytes"] + sum(row["runtime_bytes"].values())
        assert row["bundle_bytes"] < row["onnxruntime_bytes"]


def test_an_arena_is_no_smaller_than_what_lives_at_once_nor_the_peak_than_what_is_planned(
    printed: tuple[str, dict[str, Any]],
) -> None:
    _, figures = printed
    for row in figures["native"]:
        assert row["least_arena_bytes"] <= row["arena_bytes"] <= 1.1 * row["least_arena_bytes"]
        assert row["ours"]["peak_kb"] * 1024 > row["weight_bytes"] + row["arena_bytes"]
