"""`toolchain verify --json` and `toolchain why --json`: what a script reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_samples import matrix_engine, requirements, sample_release

from toolchain.cli import verify, why
from toolchain.errors import ExitCode, ToolchainError

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.toml"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    other = "aarch64" if requirements()["arch"] == "x86_64" else "x86_64"
    targets = {"here": requirements(), "elsewhere": requirements(arch=other)}
    return sample_release(tmp_path / "r", matrix_engine(tmp_path / "engine"), targets)


def test_verify_tells_each_bundle_as_json(release: Path) -> None:
    result = CliRunner().invoke(verify.command, [str(release), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["ok"], told["subject"]) == (True, str(release))
    rows = {row["target"]: row for row in told["bundles"]}
    assert rows["here"]["selftest"] == {"state": "none"}
    assert rows["here"]["digest"].startswith("sha256:")
    assert rows["here"]["files"] > 1
    assert rows["elsewhere"]["selftest"]["state"] == "not run"
    assert "cannot run here" in rows["elsewhere"]["selftest"]["reason"]
    only = json.loads(CliRunner().invoke(verify.command, [f"{release}@here", "--json"]).stdout)
    assert [row["target"] for row in only["bundles"]] == ["here"]


def test_a_target_that_the_release_does_not_have_is_not_verified_in_silence(release: Path) -> None:
    one = CliRunner().invoke(verify.command, [str(release), "--target", "here", "--json"])
    assert [row["target"] for row in json.loads(one.stdout)["bundles"]] == ["here"]
    for arguments in ([str(release), "--target", "heer"], [f"{release}@here", "--target", "elsewhere"]):
        error = CliRunner().invoke(verify.command, arguments).exception
        assert isinstance(error, ToolchainError)
        assert error.code is ExitCode.USAGE


def test_strict_fails_on_what_is_not_shown_and_names_it(release: Path, tmp_path: Path) -> None:
    plain = CliRunner().invoke(verify.command, [str(release)])
    assert plain.exit_code == 0
    assert "  warning: it carries no report of how it was verified" in plain.stdout.splitlines()
    strict = CliRunner().invoke(verify.command, [str(release), "--strict", "--json"])
    assert isinstance(strict.exception, ToolchainError)
    assert strict.exception.code is ExitCode.WEAK_EVIDENCE
    assert "elsewhere: its self-test was not run here" in strict.exception.details
    told = json.loads(strict.stdout)
    assert (told["ok"], told["exit_code"]) == (False, 35)
    assert {row["target"]: row["warnings"][0] for row in told["bundles"]} == {
        "here": "it has no self-test",
        "elsewhere": "its self-test was not run here",
    }


def test_verify_tells_damage_as_json_too(release: Path) -> None:
    largest = max((p for p in release.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.chmod(0o644)
    largest.write_bytes(np.random.default_rng(0).bytes(largest.stat().st_size))
    result = CliRunner().invoke(verify.command, [str(release), "--json"])
    assert isinstance(result.exception, ToolchainError)
    told = json.loads(result.stdout)
    assert (told["ok"], told["exit_code"]) == (False, ExitCode.DAMAGED_BUNDLE)
    assert told["error"]["kind"] == "damaged_bundle"


def test_why_tells_each_stage_as_json(tmp_path: Path) -> None:
    arguments = [str(RECIPE), "--cache", str(tmp_path), "--target", "x86-64-v3", "--stage", "export", "--json"]
    result = CliRunner().invoke(why.command, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["stages"]
    assert row["id"].startswith("export")
    assert (row["state"], row["reasons"]) == ("run", ["it has not run yet"])
