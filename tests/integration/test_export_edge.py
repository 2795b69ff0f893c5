"""The folder for a device: copied anywhere, it runs as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
from edge_support import native_runner
from helpers.bundle_samples import bundle_spec, expected_scores
from helpers.edge_samples import matrix_engine, selftest_file
from helpers.export_samples import aot_release, exported

from toolchain.bundle.manifest import RuntimeNeed
from toolchain.bundle.pack import pack_bundle, pack_release


def release_with_runtime(folder: Path) -> Path:
    built = native_runner()
    assert built.library is not None
    spec = bundle_spec(matrix_engine(folder / "engine"), selftest_npz=selftest_file(folder / "selftest.npz"))
    files = {f"runtime/{path.name}": path for path in (built.program, built.library, *built.headers)}
    manifest = replace(spec.manifest, runtime=RuntimeNeed("", ""))
    pack_release(
        "sample", "1.0.0", [pack_bundle(replace(spec, manifest=manifest, files={**spec.files, **files}))], folder / "r"
    )
    return folder / "r"


def test_the_folder_runs_where_it_is_copied_to(tmp_path: Path) -> None:
    done = exported("edge", release_with_runtime(tmp_path), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    device = tmp_path / "device"
    shutil.move(tmp_path / "out", device)
    shutil.rmtree(tmp_path / "r")
    assert sorted(p.name for p in device.iterdir()) == ["README.md", "bundle", "bundle-run", "include", "lib"]

    def run(*arguments: str) -> str:
        done = subprocess.run(["./bundle-run", *arguments], cwd=device, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(run("self-test", "bundle"))["passed"] is True
    image = np.arange(8, dtype=np.float32).reshape(2, 4) - 3
    np.save(device / "image.npy", image)
    run("run", "bundle", "--input", "image=image.npy", "--output", "scores=scores.npy")
    np.testing.assert_allclose(np.load(device / "scores.npy"), expected_scores(image), atol=1e-5)


def test_two_exports_hold_the_same_bytes(tmp_path: Path) -> None:
    release = release_with_runtime(tmp_path)
    for name in ("a", "b"):
        assert exported("edge", release, tmp_path / name).returncode == 0
    trees = [
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert trees[0] == trees[1]


def test_a_bundle_without_the_edge_runtime_is_refused_with_what_to_do(tmp_path: Path) -> None:
    done = exported("edge", aot_release(tmp_path), tmp_path / "out")
    assert done.returncode == 2
    assert "carries no edge runtime" in done.stderr
    assert "runner = true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_target_it_is_the_bundle_that_a_device_can_run(tmp_path: Path) -> None:
    built = native_runner()
    assert built.library is not None
    spec = bundle_spec(matrix_engine(tmp_path / "engine"), selftest_npz=selftest_file(tmp_path / "selftest.npz"))
    manifest = replace(spec.manifest, runtime=RuntimeNeed("", ""))
    device = replace(manifest, target=replace(manifest.target, name="device"))
    files = {**spec.files, "runtime/bundle-run": built.program}
    bundles = [replace(spec, manifest=manifest), replace(spec, manifest=device, files=files)]
    pack_release("sample", "1.0.0", [pack_bundle(each) for each in bundles], tmp_path / "r")
    done = exported("edge", tmp_path / "r", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "device" in done.stdout.splitlines()[0]
    other = replace(device, target=replace(device.target, name="other"))
    bundles.append(replace(spec, manifest=other, files=files))
    pack_release("sample", "1.0.0", [pack_bundle(each) for each in bundles], tmp_path / "s")
    done = exported("edge", tmp_path / "s", tmp_path / "out2")
    assert done.returncode == 2
    assert "several bundles for devices: device, other" in done.stderr
