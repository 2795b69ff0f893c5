"""Artifacts are named by their content and by nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.artifact import Artifact, canonical_json, digest_bytes, digest_file, digest_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@given(JSON)
def test_canonical_json_reads_back(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(list(value.items()))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"x": float("-inf")}]])
def test_canonical_json_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_canonical_json_refuses_other_types() -> None:
    with pytest.raises(TypeError):
        canonical_json({"path": Path("x")})


def test_file_names_that_are_not_utf8_have_a_canonical_form() -> None:
    name = os.fsdecode(b"weights-\xff.bin")
    assert json.loads(canonical_json([name])) == [name]


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than two chunks
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_bytes(data) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert digest_json({"b": 1, "a": 2}) == digest_bytes(b'{"a":2,"b":1}')


def test_the_digest_covers_names_contents_and_kind(tmp_path: Path) -> None:
    digests = {
        Artifact.of_folder("onnx", folder(tmp_path / "1", a="1")).digest,
        Artifact.of_folder("onnx", folder(tmp_path / "2", a="2")).digest,
        Artifact.of_folder("onnx", folder(tmp_path / "3", b="1")).digest,
        Artifact.of_folder("engine", folder(tmp_path / "4", a="1")).digest,
        Artifact.of_folder("onnx", folder(tmp_path / "5", a="1", b="")).digest,
    }
    assert len(digests) == 5


def test_the_digest_does_not_cover_place_times_owner_or_mode(tmp_path: Path) -> None:
    first = folder(tmp_path / "1", a="1", b="2")
    second = folder(tmp_path / "else" / "where", b="2", a="1")
    os.utime(second / "a", (1, 1))
    (second / "a").chmod(0o600)
    (second / "empty").mkdir()
    assert Artifact.of_folder("onnx", first) == Artifact.of_folder("onnx", second)


def test_files_of_subfolders_have_posix_names_and_a_fixed_order(tmp_path: Path) -> None:
    folder(tmp_path / "x" / "sub", b="22")
    (tmp_path / "x" / "a").write_text("1")
    (tmp_path / "x" / "link").symlink_to("a")
    artifact = Artifact.of_folder("onnx", tmp_path / "x")
    assert [(f.path, f.size) for f in artifact.files] == [("a", 1), ("link", 1), ("sub/b", 2)]
    assert artifact.size == 4


def test_an_artifact_reads_back_from_json(tmp_path: Path) -> None:
    artifact = Artifact.of_folder("onnx", folder(tmp_path / "x", a="1", b="2"))
    assert Artifact.from_json(json.loads(canonical_json(artifact.to_json()))) == artifact
