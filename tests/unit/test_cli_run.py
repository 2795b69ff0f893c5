"""`toolchain run`: what it says of a place where the outputs cannot be written, before the model runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_samples import matrix_engine, sample_release

from toolchain.cli.run import command
from toolchain.errors import ExitCode, ToolchainError


def refused(output: Path) -> ToolchainError:
    # There is no such bundle: what is wrong with --output must be told first.
    result = CliRunner().invoke(command, ["no-bundle", "in.npy", "--output", str(output)])
    assert isinstance(result.exception, ToolchainError), result.exception
    assert result.exception.code is ExitCode.USAGE
    assert result.exception.where == f"--output {output}"
    return result.exception


def test_a_folder_as_output_is_refused_with_a_name_to_use(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert "is a folder" in error.what
    assert str(tmp_path / "outputs.npz") in error.hint


def test_a_missing_folder_is_named_with_how_to_make_it(tmp_path: Path) -> None:
    error = refused(tmp_path / "none" / "y.npz")
    assert f"the folder {str(tmp_path / 'none')!r} does not exist" in error.what
    assert f"mkdir -p {tmp_path / 'none'}" in error.hint


@pytest.mark.parametrize(("name", "got"), [("y.txt", "a .txt file"), ("y.npy", "a .npy file"), ("y", "without a suff")])
def test_another_kind_of_file_is_refused_with_the_one_allowed(tmp_path: Path, name: str, got: str) -> None:
    error = refused(tmp_path / name)
    assert got in error.what
    assert "allowed: .npz" in error.what
    assert "y.npz" in error.hint


def test_an_output_that_can_be_written_is_no_obstacle(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["no-bundle", "in.npy", "--output", str(tmp_path / "y.npz")])
    assert isinstance(result.exception, ToolchainError)
    assert result.exception.where == "no-bundle"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([[1, 2, 3, 4]], []),
        ([[np.nan, 2, np.inf, -np.inf]], ["input 'image' holds 1 NaN and 2 infinite of 4 values", "output 'scores'"]),
    ],
)
def test_nan_and_infinity_are_told_on_standard_error(tmp_path: Path, given: list[list[float]], told: list[str]) -> None:
    release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "engine"))
    np.save(tmp_path / "in.npy", np.array(given, np.float32))
    result = CliRunner().invoke(command, [str(release), str(tmp_path / "in.npy"), "--json"])
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == ["scores"]
    warnings = result.stderr.splitlines()
    assert len(warnings) == len(told)
    assert all(line.startswith(f"warning: {start}") for line, start in zip(warnings, told, strict=True)), warnings
