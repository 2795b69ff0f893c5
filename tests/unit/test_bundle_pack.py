"""What packing writes, and what it leaves when it cannot."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bundle_samples import bundle_spec, matrix_engine, sample_release

from toolchain.artifact import canonical_json, digest_file
from toolchain.bundle import atomic
from toolchain.bundle.atomic import replace_folder
from toolchain.bundle.manifest import TargetInfo
from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.bundle.read import open_release
from toolchain.errors import ExitCode, ToolchainError


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix_engine(tmp_path_factory.mktemp("engine"))


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in folder.rglob("*") if p.is_file()}


def test_a_release_is_an_oci_image_layout_of_modelpack_artifacts(engine: Path, tmp_path: Path) -> None:
    release = sample_release(tmp_path / "r", engine)
    assert json.loads((release / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((release / "index.json").read_text())

    def blob(descriptor: dict) -> dict:
        path = release / "blobs" / descriptor["digest"].replace(":", "/")
        assert path.stat().st_size == descriptor["size"]
        return json.loads(path.read_text())

    manifests = blob(index["manifests"][0])["manifests"]
    assert [m["platform"]["os"] for m in manifests] == ["linux"]
    manifest = blob(manifests[0])
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = blob(manifest["config"])
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert types == {
        "bundle.json": "application/vnd.toolchain.bundle.v1+json",
        "contract.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "engine.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "model.onnx": "application/vnd.cncf.model.weight.v1.raw",
    }


def test_the_bytes_depend_neither_on_folder_time_nor_order(engine: Path, tmp_path: Path) -> None:
    first = sample_release(tmp_path / "a" / "r", engine, {"one": _needs(), "two": _needs()})
    for path in engine.iterdir():
        os.utime(path, (1, 1))
    second = sample_release(tmp_path / "elsewhere" / "s", engine, {"two": _needs(), "one": _needs()})
    assert tree(first) == tree(second)
    text = b"".join(p.read_bytes() for p in first.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in text


def _needs() -> dict:
    return {"os": "linux", "arch": "x86_64", "cpu_features": [], "libc": None, "cuda_arch": None}


def test_platforms_have_the_names_of_oci(engine: Path) -> None:
    def platform(arch: str, model: str) -> dict:
        spec = bundle_spec(engine, "t", _needs() | {"arch": arch})
        profile = TargetInfo("t", {"cpu": {"model": model}})
        return dict(pack_bundle(replace(spec, manifest=replace(spec.manifest, target=profile))).descriptor.platform)

    assert platform("x86_64", "x86-64-v3") == {"os": "linux", "architecture": "amd64", "variant": "v3"}
    assert platform("x86_64", "znver4") == {"os": "linux", "architecture": "amd64"}
    assert platform("aarch64", "cortex-a72") == {"os": "linux", "architecture": "arm64", "variant": "v8"}


def test_an_equal_release_is_left_untouched_and_a_damaged_one_is_written_anew(engine: Path, tmp_path: Path) -> None:
    packed = [pack_bundle(bundle_spec(engine))]
    first = pack_release("sample", "1.0.0", packed, tmp_path / "r")
    inode = (tmp_path / "r" / "index.json").stat().st_ino
    second = pack_release("sample", "1.0.0", packed, tmp_path / "r")
    assert (first.unchanged, second.unchanged) == (False, True)
    assert first.digest == second.digest
    assert (tmp_path / "r" / "index.json").stat().st_ino == inode
    blob = max((tmp_path / "r" / "blobs" / "sha256").iterdir(), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert not pack_release("sample", "1.0.0", packed, tmp_path / "r").unchanged
    open_release(tmp_path / "r").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_another_release_takes_the_place_of_the_old_one(engine: Path, tmp_path: Path) -> None:
    sample_release(tmp_path / "r", engine, {"old": _needs()})
    sample_release(tmp_path / "r", engine, {"new": _needs()})
    release = open_release(tmp_path / "r")
    release.verify()
    assert [b.target for b in release.bundles] == ["new"]
    assert len(list((tmp_path / "r" / "blobs" / "sha256").iterdir())) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_folder_with_files_of_the_user_is_not_replaced(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("years of work")
    with pytest.raises(ToolchainError, match=r"thesis\.tex") as caught:
        sample_release(tmp_path / "r", engine)
    assert caught.value.code is ExitCode.STORAGE
    assert (tmp_path / "r" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//b", "", ".", "a\\b", "c:x", "a\nb"])
def test_unsafe_names_are_refused_when_packing(engine: Path, name: str) -> None:
    spec = bundle_spec(engine)
    with pytest.raises(ToolchainError, match="does not hold together"):
        pack_bundle(BundleSpec(spec.manifest, dict(spec.files) | {name: engine / "engine.json"}))


def test_a_bundle_that_contradicts_its_files_is_refused(engine: Path, tmp_path: Path) -> None:
    spec = bundle_spec(engine)
    other = tmp_path / "contract.json"
    other.write_bytes(canonical_json({**spec.manifest.contract, "preprocessing": "something else"}))
    with pytest.raises(ToolchainError, match="different contracts"):
        pack_bundle(BundleSpec(spec.manifest, dict(spec.files) | {"contract.json": other}))
    without = {name: path for name, path in spec.files.items() if name != "model.onnx"}
    with pytest.raises(ToolchainError, match=r"'model\.onnx' is missing"):
        pack_bundle(BundleSpec(spec.manifest, without))


def test_a_source_that_changes_while_it_is_packed_is_noticed(engine: Path, tmp_path: Path) -> None:
    extra = tmp_path / "report.md"
    extra.write_text("before")
    packed = pack_bundle(bundle_spec(engine, report_md=extra))
    extra.write_text("after!")
    with pytest.raises(ToolchainError, match="changed while it was packed"):
        pack_release("sample", "1.0.0", [packed], tmp_path / "r")
    assert not (tmp_path / "r").exists()


class TestFailures:
    """Packing is interrupted or the disk refuses: the old release stays, nothing half-written is left."""

    # An interrupt between open() and the block that closes the file leaves the closing to the collector.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_an_interrupt_at_any_moment_leaves_the_old_or_the_new_release(self, engine: Path, tmp_path: Path) -> None:
        big = tmp_path / "report.md"
        folder = tmp_path / "out" / "r"
        sample_release(folder, engine)
        outcomes = set()
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for step in range(24):
                big.write_bytes(bytes([step]) * 2_000_000)
                packed = [pack_bundle(bundle_spec(engine, report_md=big))]
                before = open_release(folder).digest
                started = time.perf_counter()
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 * (step + 1))
                    pack_release("sample", "1.0.0", packed, folder)
                    outcomes.add("done")
                except KeyboardInterrupt:
                    outcomes.add("interrupted")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert time.perf_counter() - started < 5
                release = open_release(folder)
                release.verify()
                assert release.digest == before or "report.md" in release.bundles[0].files
                assert [p.name for p in folder.parent.iterdir()] == ["r"]
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert "interrupted" in outcomes

    def test_a_file_size_limit_ends_in_one_storage_error(self, engine: Path, tmp_path: Path) -> None:
        (tmp_path / "report.md").write_bytes(b"x" * 200_000)
        script = """
            import resource, sys
            sys.path[:0] = [sys.argv[1]]
            from pathlib import Path
            from helpers.bundle_samples import bundle_spec
            from toolchain.bundle.pack import pack_bundle, pack_release
            from toolchain.errors import ToolchainError
            base = Path(sys.argv[2])
            packed = pack_bundle(bundle_spec(Path(sys.argv[3]), report_md=base / "report.md"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                pack_release("sample", "1.0.0", [packed], base / "out" / "r")
            except ToolchainError as error:
                sys.exit(int(error.code))
        """
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", textwrap.dedent(script), tests, str(tmp_path), str(engine)]
        assert subprocess.run(command, timeout=60).returncode == ExitCode.STORAGE
        assert not (tmp_path / "out").exists()

    def test_a_full_disk_leaves_the_old_release(self, engine: Path, tmp_path: Path) -> None:
        (tmp_path / "report.md").write_bytes(os.urandom(400_000))
        script = """
            import sys
            sys.path[:0] = [sys.argv[1]]
            from pathlib import Path
            from helpers.bundle_samples import bundle_spec, sample_release
            from toolchain.bundle.pack import pack_bundle, pack_release
            from toolchain.bundle.read import open_release
            from toolchain.errors import ToolchainError
            base, engine, disk = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
            sample_release(disk / "r", engine)
            packed = pack_bundle(bundle_spec(engine, report_md=base / "report.md"))
            try:
                pack_release("sample", "1.0.0", [packed], disk / "r")
            except ToolchainError as error:
                open_release(disk / "r").verify()
                print([p.name for p in disk.iterdir()], int(error.code), error)
        """
        disk = tmp_path / "disk"
        disk.mkdir()
        python = [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parents[1])]
        shell = 'mount -t tmpfs -o size=256k none "$0" && exec "$@"'
        mounted = ["unshare", "-rm", "sh", "-c", shell, str(disk), *python, str(tmp_path), str(engine), str(disk)]
        done = subprocess.run(mounted, capture_output=True, text=True, timeout=60)
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        assert done.stderr == ""
        assert done.stdout.startswith(f"['r'] {int(ExitCode.STORAGE)}")
        assert "no space left" in done.stdout

    def test_what_a_killed_writer_left_is_removed_by_the_next(self, engine: Path, tmp_path: Path) -> None:
        left = tmp_path / ".r.tmp-0123456789abcdef"
        (left / "blobs").mkdir(parents=True)
        sample_release(tmp_path / "r", engine)
        assert [p.name for p in tmp_path.iterdir()] == ["r"]

    def test_a_living_writer_is_left_alone(self, engine: Path, tmp_path: Path) -> None:
        def outer(staging: Path) -> None:
            sample_release(tmp_path / "r", engine)
            assert staging.is_dir()
            (staging / "oci-layout").write_text("mine")

        replace_folder(tmp_path / "r", outer)
        assert (tmp_path / "r" / "oci-layout").read_text() == "mine"
        assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_without_an_atomic_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for text in ("one", "two"):
        replace_folder(tmp_path / "r", lambda staging, text=text: (staging / "file").write_text(text) and None)
    assert (tmp_path / "r" / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_an_exchange_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        atomic.exchange(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.ENOENT
    assert re.search("b", str(caught.value))
