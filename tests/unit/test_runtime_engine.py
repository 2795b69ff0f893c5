"""Opening engines: what is wrong is said before anything runs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    bundle_spec,
    expected_scores,
    host_with,
    matrix_engine,
    matrix_model,
    requirements,
    sample_release,
    write_engine,
)

from toolchain.bundle.manifest import RuntimeNeed, Tolerance
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime import load, open_engine, run_selftest
from toolchain.runtime.need import check_runtime, version_suits

IMAGE = np.array([[1, 2, 3, 4], [-1, 0, 1, 2]], np.float32)


def test_an_engine_runs_and_gives_the_contracts_outputs(tmp_path: Path) -> None:
    engine = open_engine(matrix_engine(tmp_path / "e"), threads=1)
    outputs = engine.run({"image": IMAGE})
    np.testing.assert_allclose(outputs["scores"], expected_scores(IMAGE), atol=1e-6)
    assert engine.info.backend == "onnxruntime"


def test_several_threads_may_run_one_engine(tmp_path: Path) -> None:
    engine = open_engine(matrix_engine(tmp_path / "e", [1, 8]), threads=1)
    images = [np.full((n, 4), n, np.float32) for n in range(1, 20)]
    with ThreadPoolExecutor(4) as pool:
        for image, got in zip(images, pool.map(lambda i: engine.run({"image": i}), images), strict=True):
            np.testing.assert_allclose(got["scores"], expected_scores(image), atol=1e-4)


def test_a_provider_that_is_missing_never_means_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"provider CUDAExecutionProvider.*CPUExecutionProvider") as caught:
        open_engine(matrix_engine(tmp_path / "e"), provider="CUDAExecutionProvider")
    assert caught.value.code is ExitCode.INCOMPATIBLE_HOST


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("engine.json", None, "is missing"),
        ("engine.json", {"schema": 1, "backend": "onnx", "variants": [{"file": "a"}]}, "one of onnxruntime, tvm"),
        ("contract.json", {"schema": 1}, "lacks the key 'inputs'"),
        ("model.onnx", None, "names the engine file model.onnx, which is missing"),
        ("model.onnx", "garbage", "cannot load it"),
    ],
)  # fmt: skip
def test_an_incomplete_folder_is_damaged(tmp_path: Path, file: str, content: object, message: str) -> None:
    folder = matrix_engine(tmp_path / "e")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ToolchainError) as caught:
        open_engine(folder)
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE
    assert message in caught.value.what


def test_a_model_that_contradicts_its_contract_is_damaged(tmp_path: Path) -> None:
    folder = matrix_engine(tmp_path / "e")
    renamed = deepcopy(MATRIX_CONTRACT)
    renamed["outputs"][0]["name"] = "logits"
    write_engine(folder, renamed, {"model.onnx": {}})
    with pytest.raises(ToolchainError, match="differ from its contract: logits"):
        open_engine(folder)
    wider = deepcopy(MATRIX_CONTRACT)
    wider["outputs"][0]["shape"] = ["batch", 5]
    write_engine(folder, wider, {"model.onnx": {}})
    with pytest.raises(ToolchainError, match=r"its contract says float32\[batch, 5\]") as caught:
        open_engine(folder).run({"image": IMAGE})
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE


def test_what_the_engine_refuses_at_run_time_is_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    onnx.save(matrix_model(2), folder / "model.onnx")
    write_engine(folder, MATRIX_CONTRACT, {"model.onnx": {}})  # claims any batch, takes 2
    with pytest.raises(ToolchainError, match="failed on these inputs") as caught:
        open_engine(folder).run({"image": IMAGE[:1]})
    assert caught.value.code is ExitCode.BAD_INPUT


class TestLoad:
    """A bundle is checked before it is loaded."""

    def test_a_bundle_runs_and_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
        (tmp_path / "temp").mkdir()
        release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e", [1, 8]))
        with load(release, threads=1) as model:
            np.testing.assert_allclose(model.run({"image": IMAGE})["scores"], expected_scores(IMAGE), atol=1e-6)
            assert model.info.target.name == "any"
        assert list((tmp_path / "temp").iterdir()) == []

    def test_a_loaded_bundle_outlives_the_replacement_of_its_release(self, tmp_path: Path) -> None:
        engine = matrix_engine(tmp_path / "e", [1, 8])
        release = sample_release(tmp_path / "r", engine)
        with load(release, threads=1) as model:
            sample_release(tmp_path / "r", matrix_engine(tmp_path / "other"))
            assert model.run({"image": IMAGE})["scores"].shape == (2, 3)  # opens the second variant only now

    def test_a_wrong_machine_is_refused_before_the_layers_are_read(self, tmp_path: Path) -> None:
        targets = {"x": requirements(("avx2", "avx512f"), "x86_64"), "arm": requirements(("asimd",), "aarch64")}
        release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"), targets)
        weak = host_with(arch="x86_64", cpu_features=frozenset({"avx2"}), glibc="2.36")
        with pytest.raises(ToolchainError, match="needs CPU feature avx512f") as caught:
            load(release, target="x", host=weak)
        assert caught.value.code is ExitCode.INCOMPATIBLE_HOST
        with pytest.raises(ToolchainError, match="needs a processor of architecture aarch64") as caught:
            load(f"{release}@arm", host=weak)
        assert caught.value.code is ExitCode.INCOMPATIBLE_HOST

    def test_a_flipped_bit_in_the_model_is_refused(self, tmp_path: Path) -> None:
        release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"))
        blob = next(p for p in (release / "blobs" / "sha256").iterdir() if b"MatMul" in p.read_bytes())
        content = bytearray(blob.read_bytes())
        content[40] ^= 4
        blob.write_bytes(content)
        with pytest.raises(ToolchainError, match=r"model\.onnx: content has digest") as caught:
            load(release)
        assert caught.value.code is ExitCode.DAMAGED_BUNDLE

    def test_a_closed_model_says_so(self, tmp_path: Path) -> None:
        with load(sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"))) as model:
            pass
        with pytest.raises(ToolchainError, match="the model has been closed") as caught:
            model.run({"image": [[1.0, 2.0, 3.0, 4.0]]})
        assert caught.value.code is ExitCode.USAGE

    def test_a_target_named_twice_must_be_the_same(self, tmp_path: Path) -> None:
        release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"))
        load(f"{release}@any", target="any").close()
        with pytest.raises(ToolchainError, match="is asked for too"):
            load(f"{release}@any", target="other")


class TestNeed:
    """The installed runtime must be one that suits."""

    def test_versions_are_compared_as_numbers(self) -> None:
        assert version_suits("1.32.0", ">=1.18,<2")
        assert version_suits("1.9", "<1.10")
        assert version_suits("0.27.0.post1", "==0.27.0.post1")
        assert version_suits("2.0.0", "==2")
        assert not version_suits("2.0", ">=1.18,<2")
        assert not version_suits("1.17.3", ">=1.18")
        assert version_suits("3", "")
        with pytest.raises(ToolchainError, match="not a range"):
            version_suits("1", "~=1.0")

    def test_a_missing_or_other_version_gives_the_pip_command(self) -> None:
        with pytest.raises(ToolchainError, match="which is not installed") as caught:
            check_runtime(RuntimeNeed("no-such-runtime", ">=1"))
        assert caught.value.code is ExitCode.MISSING_TOOL
        assert caught.value.hint == 'pip install "no-such-runtime>=1"'
        with pytest.raises(ToolchainError, match="needs onnxruntime >=99") as caught:
            check_runtime(RuntimeNeed("onnxruntime", ">=99"))
        assert caught.value.code is ExitCode.INCOMPATIBLE_HOST


class TestSelfTest:
    """A bundle repeats on this machine what was recorded at its build."""

    def test_recorded_outputs_pass_and_others_fail_with_figures(self, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
        np.savez(good, **{"input:image": IMAGE, "output:scores": expected_scores(IMAGE)})
        np.savez(bad, **{"input:image": IMAGE, "output:scores": expected_scores(IMAGE) + 0.5})
        spec = bundle_spec(matrix_engine(tmp_path / "e"), selftest_npz=good)
        pack_release("sample", "1.0.0", [pack_bundle(spec)], tmp_path / "r")
        with load(tmp_path / "r") as model:
            assert run_selftest(model, good).passed
            result = run_selftest(model, bad)
            assert not result.passed
            assert result.outputs[0].max_abs_error == pytest.approx(0.5, abs=1e-5)
            assert "largest error 0.5, allowed 0.0001" in result.problems[0]
            assert run_selftest(model, bad, Tolerance(max_abs_error=1.0)).passed

    def test_nan_in_the_outputs_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "s.npz"
        np.savez(path, **{"input:image": IMAGE * np.float32("nan"), "output:scores": expected_scores(IMAGE)})
        engine = open_engine(matrix_engine(tmp_path / "e"))
        result = run_selftest(engine, path, Tolerance(cosine=0.9, max_abs_error=1.0))
        assert len(result.problems) == 2

    def test_a_file_that_is_no_selftest_is_damaged(self, tmp_path: Path) -> None:
        engine = open_engine(matrix_engine(tmp_path / "e"))
        (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 truncated")
        np.savez(tmp_path / "y.npz", **{"input:image": IMAGE})
        for name in ("x.npz", "y.npz"):
            with pytest.raises(ToolchainError) as caught:
                run_selftest(engine, tmp_path / name, Tolerance(cosine=0.9))
            assert caught.value.code is ExitCode.DAMAGED_BUNDLE
