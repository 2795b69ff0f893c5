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
