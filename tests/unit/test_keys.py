"""Versions of installed distributions, read without parsing all of their metadata."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from toolchain.keys import installed_version


def test_versions_are_those_that_importlib_tells() -> None:
    names = sorted({d.metadata["Name"] for d in importlib.metadata.distributions()})
    assert len(names) > 20
    assert {n: installed_version(n) for n in names} == {n: importlib.metadata.version(n) for n in names}
    assert installed_version("no-such-distribution") == "not installed"


@pytest.mark.parametrize(
    "metadata",
    [
        "Metadata-Version: 2.1\nName: odd-one\nVersion: 1.2+local\n\nVersion: 9 is what the text says\n",
        "Metadata-Version: 2.1\nName: odd-one\nVersion:\n 1.2+local\n\nfolded\n",
        "Metadata-Version: 2.1\r\nName: odd-one\r\nVersion: 1.2+local\r\n\r\nVersion: 9\r\n",
    ],
)
def test_odd_metadata_gives_the_same_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str) -> None:
    folder = tmp_path / "odd_one-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_bytes(metadata.encode())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    installed_version.cache_clear()
    assert installed_version("odd-one") == importlib.metadata.version("odd-one")
    installed_version.cache_clear()
