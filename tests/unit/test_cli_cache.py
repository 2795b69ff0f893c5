"""`toolchain cache` shows and prunes the stage cache."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolchain.cache import Cache, Record
from toolchain.cli.cache import command
from toolchain.errors import ExitCode, ToolchainError


def fill(folder: Path, count: int, size: int = 1 << 20) -> Cache:
    """A cache of ``count`` records with an artifact of ``size`` bytes each, the oldest first."""
    import os

    cache = Cache(folder)
    for index in range(count):
        with cache.scratch() as scratch:
            made = scratch / "onnx"
            made.mkdir()
            (made / "model.onnx").write_bytes(bytes([index]) * size)
            record = Record(f"sha256:{index:064x}", {"index": index}, (), {"onnx": cache.add("onnx", made)})
        cache.put(record)
        os.utime(cache._record_path(record), (1000 + index, 1000 + index))
    return cache


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_looking_at_a_cache_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    text = run("--cache", tmp_path / "none")
    assert "not made yet" in text
    assert not (tmp_path / "none").exists()


def test_size_count_folder_and_limit_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("TOOLCHAIN_CACHE_LIMIT_MB", "7")
    fill(tmp_path / "c", 3)
    facts = json.loads(run("--json"))
    assert facts["folder"] == str(tmp_path / "c")
    assert (facts["artifacts"], facts["records"], facts["limit_bytes"]) == (3, 3, 7 << 20)
    assert 3 << 20 < facts["bytes"] < (3 << 20) + 4096
    text = run()
    assert "3.0 MiB of at most 7.0 MiB" in text
    assert str(tmp_path / "c") in text


def test_prune_to_a_size_keeps_the_newest(tmp_path: Path) -> None:
    cache = fill(tmp_path, 4)
    facts = json.loads(run("--cache", tmp_path, "prune", "--max-size", "3", "--json"))
    assert (facts["removed_records"], facts["removed_artifacts"]) == (2, 2)
    assert 2 << 20 <= facts["freed_bytes"] < (2 << 20) + 4096
    assert [bool(cache.records(f"sha256:{i:064x}")) for i in range(4)] == [False, False, True, True]


def test_prune_all_empties_the_cache(tmp_path: Path) -> None:
    cache = fill(tmp_path, 2, size=100)
    assert "removed 2 records and 2 artifacts" in run("--cache", tmp_path, "prune", "--all")
    assert cache.size() == {"bytes": 0, "artifacts": 0, "records": 0}


def test_prune_without_options_uses_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE_LIMIT_MB", "2")
    cache = fill(tmp_path, 3)
    assert "removed 2 records" in run("--cache", tmp_path, "prune")
    assert cache.size()["artifacts"] == 1


def test_prune_refuses_while_a_build_uses_the_cache(tmp_path: Path) -> None:
    cache = fill(tmp_path, 1, size=10)
    with cache.in_use():
        result = CliRunner().invoke(command, ["--cache", str(tmp_path), "prune", "--all"])
    assert isinstance(result.exception, ToolchainError)
    assert result.exception.code is ExitCode.STORAGE
    assert cache.size()["artifacts"] == 1


def test_all_and_a_size_exclude_each_other(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--cache", str(tmp_path), "prune", "--all", "--max-size", "1"])
    assert result.exit_code == ExitCode.USAGE
    assert "exclude each other" in result.stderr


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = CliRunner().invoke(command, ["--cache", str(tmp_path / "file")])
    assert isinstance(result.exception, ToolchainError)
    assert result.exception.code is ExitCode.STORAGE


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE_LIMIT_MB", "many")
    result = CliRunner().invoke(command, ["--cache", str(tmp_path)])
    assert isinstance(result.exception, ToolchainError)
    assert result.exception.where == "TOOLCHAIN_CACHE_LIMIT_MB"
