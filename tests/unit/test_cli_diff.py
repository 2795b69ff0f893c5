"""`toolchain diff` on releases and on single bundles of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.bundle_samples import bundle_spec, matrix_engine

from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.cli.diff import command
from toolchain.cli.difference import difference_lines
from toolchain.errors import ExitCode, ToolchainError


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release for the targets ``one`` and ``two``."""
    (tmp_path / "report.json").write_text(json.dumps({"stages": {}}))
    engine, report = matrix_engine(tmp_path / "engine"), tmp_path / "report.json"
    packed = [pack_bundle(bundle_spec(engine, target, **{"report.json": report})) for target in ("one", "two")]
    return pack_release("matrix", "1.0.0", packed, tmp_path / "release").folder


def differences(*arguments: str) -> Any:
    result = CliRunner().invoke(command, [*arguments, "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def test_two_bundles_of_different_targets_are_compared(release: Path) -> None:
    found = differences(f"{release}@one", f"{release}@two")
    assert list(found) == ["one -> two"]
    assert "digest" in found["one -> two"]


def test_a_target_named_once_means_that_bundle_of_both(release: Path) -> None:
    same: dict[str, Any] = {"two": {}}
    assert differences(f"{release}@two", str(release)) == same
    assert differences(str(release), f"{release}@two") == same
    assert differences(f"{release}@two", f"{release}@two") == same


def test_whole_releases_are_compared_by_target(release: Path) -> None:
    assert differences(str(release), str(release)) == {"one": {}, "two": {}}


def test_an_unknown_target_is_named_with_those_there_are(release: Path) -> None:
    with pytest.raises(ToolchainError, match=r"no bundle for target 'three'.*it has one, two") as caught:
        differences(f"{release}@three", str(release))
    assert caught.value.code is ExitCode.USAGE


def test_differences_are_a_table_with_rounded_figures_and_how_much_they_changed() -> None:
    changes = {
        "engine": ("fp32/tvm", "int8-static/tvm"),
        "accuracy": (0.99259259, 0.98888888),
        "cosine": (0.9999999999999888, 0.9999999999999944),
        "median (ms)": (0.017575999663677067, None),
        "p95 (ms)": (0.2, 0.1),
        "size (bytes)": (29000, 29290),
        "inputs": ("x float32[batch, 8]", "x float32[8]"),
        "operator Conv": (None, 3),
        "operator Relu": (4, 3),
        "digest": ("sha256:" + "1" * 64, "sha256:" + "2" * 64),
    }
    assert difference_lines({"one": changes, "two": {}}) == [
        "one:",
        "                 old                  new                  change",
        "  engine         fp32/tvm             int8-static/tvm",
        "  accuracy       0.9926               0.9889               -0.0037",
        "  cosine         1.000000             1.000000             +5.7e-15",
        "  median (ms)    0.018                -",
        "  p95 (ms)       0.200                0.100                -50.0%",
        "  size (bytes)   29,000               29,290               +1.0%",
        "  inputs         x float32[batch, 8]  x float32[8]",
        "  operator Conv  -                    3",
        "  operator Relu  4                    3                    -1",
        "  digest         sha256:111111111111  sha256:222222222222",
        "two: the same",
    ]
