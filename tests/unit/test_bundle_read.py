"""Every way in which a release can be damaged is noticed, in one clear line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.bundle_samples import bundle_spec, matrix_engine, sample_release
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolchain.artifact import canonical_json, digest_bytes
from toolchain.bundle.check import parse_descriptor
from toolchain.bundle.layout import blob_of_bytes, blob_path, index_json
from toolchain.bundle.pack import pack_bundle, pack_release, place_layout, release_layout
from toolchain.bundle.read import copy_bundle, open_release
from toolchain.errors import ExitCode, ToolchainError


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    (folder / "report.md").write_text("# Report\n")
    packed = [
        pack_bundle(bundle_spec(matrix_engine(folder / name), name, report_md=folder / "report.md"))
        for name in ("one", "two")
    ]
    pack_release("sample", "1.0.0", packed, folder / "r")
    return folder / "r"


def files_of(release: Path) -> list[Path]:
    return sorted(p for p in release.rglob("*") if p.is_file())


def check(release: Path) -> None:
    open_release(release).verify()


def refusal(release: Path) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        check(release)
    assert len(caught.value.what.splitlines()) == 1
    return caught.value


@given(file=st.integers(0), place=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=300)
@example(file=0, place=0, bit=0)
def test_one_flipped_bit_anywhere_is_noticed(release: Path, file: int, place: int, bit: int) -> None:
    path = files_of(release)[file % len(files_of(release))]
    good = path.read_bytes()
    bad = bytearray(good)
    bad[place % len(good)] ^= 1 << bit
    path.write_bytes(bad)
    try:
        error = refusal(release)
    finally:
        path.write_bytes(good)
    assert error.code is ExitCode.DAMAGED_BUNDLE
    assert str(release) in error.where
    check(release)


def test_each_bit_of_the_index_counts(release: Path) -> None:
    """The index is the one file that no digest covers."""
    path = release / "index.json"
    good = path.read_bytes()
    try:
        for place in range(len(good)):
            for bit in (0, 5):  # 5 turns letters into capitals, which JSON forgives
                bad = bytearray(good)
                bad[place] ^= 1 << bit
                path.write_bytes(bad)
                assert refusal(release).code is ExitCode.DAMAGED_BUNDLE
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "missing", "folder"])
def test_a_file_of_another_length_or_kind_is_noticed(release: Path, damage: str) -> None:
    for path in files_of(release):
        good = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes({"truncated": good[:-1], "empty": b"", "longer": good + b" "}[damage])
        try:
            if (damage, path.name) == ("longer", "index.json"):
                check(release)  # white space at the end changes nothing that is read
            else:
                assert refusal(release).code is ExitCode.DAMAGED_BUNDLE
        finally:
            shutil.rmtree(path) if damage == "folder" else path.unlink(missing_ok=True)
            path.write_bytes(good)


def test_the_message_names_the_file_and_both_digests(release: Path) -> None:
    bundle = open_release(release).bundles[0]
    descriptor = bundle.files["model.onnx"]
    path = release / blob_path(descriptor.digest)
    good = path.read_bytes()
    bad = bytes([good[0] ^ 1]) + good[1:]
    path.write_bytes(bad)
    try:
        error = refusal(release)
    finally:
        path.write_bytes(good)
    assert error.render().splitlines()[0] == (
        f"{path}: model.onnx: content has digest {digest_bytes(bad)}, expected {descriptor.digest}"
    )


def test_a_fifo_in_place_of_a_blob_does_not_hang(release: Path) -> None:
    path = max((release / "blobs" / "sha256").iterdir(), key=lambda p: p.stat().st_size)
    good = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    try:
        assert "not a regular file" in refusal(release).what
    finally:
        path.unlink()
        path.write_bytes(good)


def test_a_damaged_layer_of_one_target_leaves_the_other_usable(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.md").write_text(name)
        paths.append(bundle_spec(matrix_engine(tmp_path / name), name, report_md=tmp_path / f"{name}.md"))
    pack_release("sample", "1.0.0", [pack_bundle(p) for p in paths], tmp_path / "r")
    release = open_release(tmp_path / "r")
    (tmp_path / "r" / blob_path(release.bundles[1].files["report.md"].digest)).write_text("TWO")
    release.bundles[0].verify()
    with pytest.raises(ToolchainError, match=r"report\.md"):
        release.bundles[1].verify()


class TestRewritten:
    """Releases whose digests hold, but whose content is not ours."""

    @pytest.fixture
    def rewrite(self, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
        engine = matrix_engine(tmp_path / "engine")

        def rewritten(change: Callable[[dict[str, Any]], object]) -> Path:
            packed = pack_bundle(bundle_spec(engine))
            blobs = dict(packed.blobs)
            manifest = json.loads(blobs.pop(packed.descriptor.digest).source)
            change(manifest)
            for layer in manifest["layers"]:
                if "content" in layer:
                    blob = blob_of_bytes(layer.pop("content"))
                    layer.update(digest=blob.digest, size=blob.size)
                    blobs[blob.digest] = blob
            blob = blob_of_bytes(canonical_json(manifest))
            blobs[blob.digest] = blob
            descriptor = replace(packed.descriptor, digest=blob.digest, size=blob.size)
            place_layout(release_layout("sample", "1.0.0", [descriptor], [blobs]), tmp_path / "r")
            return tmp_path / "r"

        return rewritten

    @pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "engine.json", "engine.json/x"])
    def test_names_that_leave_the_folder_or_collide_are_refused(self, rewrite: Any, name: str, tmp_path: Path) -> None:
        def change(manifest: dict[str, Any]) -> None:
            layer = next(x for x in manifest["layers"] if "model.onnx" in x["annotations"].values())
            manifest["layers"].append({**layer, "annotations": {"org.cncf.model.filepath": name}})

        error = refusal(rewrite(change))
        assert error.code is ExitCode.DAMAGED_BUNDLE
        assert "unsafe file name" in error.what

    def test_a_newer_schema_says_to_upgrade(self, rewrite: Any) -> None:
        def change(manifest: dict[str, Any]) -> None:
            layer = next(x for x in manifest["layers"] if x["mediaType"].startswith("application/vnd.toolchain"))
            layer["content"] = canonical_json({"schema": 2, "whatever": "comes"})

        error = refusal(rewrite(change))
        assert error.code is ExitCode.INCOMPATIBLE_HOST
        assert "made for schema 2" in error.what
        assert "understands up to 1" in error.what
        assert "upgrade" in error.hint

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("nam", "x", "unknown key 'nam' (did you mean 'name'?)"),
            (
                "engine",
                {"backend": "cobol", "precision": "fp32", "device": "cpu", "variants": [{"file": "a"}]},
                "cobol",
            ),
            ("engine", {"backend": "tvm", "precision": "fp32", "device": "cpu", "variants": []}, "at least one"),
            ("requirements", {"os": "linux", "arch": "x86_64"}, "cpu_features"),
            ("tools", {"torch": 2}, "object of strings"),
            ("selftest", {"cosine": "high"}, "selftest.cosine"),
        ],
    )
    def test_a_wrong_bundle_json_names_the_key(self, rewrite: Any, key: str, value: Any, message: str) -> None:
        def change(manifest: dict[str, Any]) -> None:
            layer = next(x for x in manifest["layers"] if x["mediaType"].startswith("application/vnd.toolchain"))
            good = bundle_json()
            layer["content"] = canonical_json({**good, key: value})

        def bundle_json() -> dict[str, Any]:
            path = rewrite(lambda manifest: None)
            return open_release(path).bundles[0].manifest.to_json()

        error = refusal(rewrite(change))
        assert error.code is ExitCode.DAMAGED_BUNDLE
        assert message in error.what

    def test_deeply_nested_json_is_refused(self, rewrite: Any) -> None:
        def change(manifest: dict[str, Any]) -> None:
            layer = next(x for x in manifest["layers"] if x["mediaType"].startswith("application/vnd.toolchain"))
            layer["content"] = b"[" * 100_000

        assert "is not JSON" in refusal(rewrite(change)).what


def test_what_is_no_release_is_a_usage_error(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is not a bundle"), (tmp_path / "no", "does not exist")):
        with pytest.raises(ToolchainError, match=message) as caught:
            open_release(path)
        assert caught.value.code is ExitCode.USAGE


def test_a_hostile_index_cannot_fill_the_memory(tmp_path: Path) -> None:
    release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"))
    root = json.loads((release / "index.json").read_text())["manifests"][0]
    (release / "index.json").write_bytes(index_json(replace(parse_descriptor(root, ""), size=1 << 40)))
    assert "at most" in refusal(release).what


class TestFiles:
    """Getting the files of a bundle."""

    def test_extract_gives_own_copies_under_their_names(self, release: Path, tmp_path: Path) -> None:
        bundle = open_release(release).bundles[0]
        bundle.extract(tmp_path / "x")
        assert {p.name for p in (tmp_path / "x").iterdir()} == set(bundle.files)
        (tmp_path / "x" / "model.onnx").write_bytes(b"changed by the user")
        check(release)
        with pytest.raises(ToolchainError, match="not empty") as caught:
            bundle.extract(tmp_path / "x")
        assert caught.value.code is ExitCode.STORAGE

    def test_materialize_gives_a_folder_and_removes_it(self, release: Path) -> None:
        bundle = open_release(release).bundles[0]
        with bundle.materialize() as folder:
            assert (folder / "report.md").read_text() == "# Report\n"
        assert not folder.exists()
        check(release)

    def test_a_copy_of_one_target_keeps_its_digest(self, release: Path, tmp_path: Path) -> None:
        bundle = open_release(release).bundle("two")
        assert bundle is not None
        assert not copy_bundle(bundle, tmp_path / "copy")
        assert copy_bundle(bundle, tmp_path / "copy")
        copy = open_release(tmp_path / "copy")
        copy.verify()
        assert [b.digest for b in copy.bundles] == [bundle.digest]
        assert (copy.name, copy.version) == ("sample", "1.0.0")
        assert len(files_of(tmp_path / "copy")) < len(files_of(release))

    def test_bundle_json_comes_back_as_it_was_written(self, release: Path, tmp_path: Path) -> None:
        spec = bundle_spec(matrix_engine(tmp_path / "e"), "one")
        bundle = open_release(release).bundles[0]
        assert bundle.manifest == spec.manifest
        assert bundle.read("bundle.json") == spec.manifest.to_bytes()


def test_a_folder_of_releases_is_no_release_but_names_those_in_it(tmp_path: Path) -> None:
    made = sample_release(tmp_path / "artifacts" / "tiny" / "0.1.0", matrix_engine(tmp_path / "engine"))
    for folder in (made.parent, made.parent.parent):
        with pytest.raises(ToolchainError, match="is not a bundle or release") as caught:
            open_release(folder)
        assert caught.value.hint == f"releases in it: {made}"
    with pytest.raises(ToolchainError) as caught:
        open_release(tmp_path / "engine")
    assert caught.value.hint == ""
