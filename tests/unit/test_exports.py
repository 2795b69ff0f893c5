"""`toolchain export`: what is written, when it is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from helpers.export_samples import aot_release, files_of, onnx_release

from toolchain.bundle.layout import Blob, blob_of_bytes
from toolchain.cli.export import command
from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.files import text_file, write_tree, yaml_file
from toolchain.exports.source import numbered, open_source

IMAGES = ["--image", "registry.example/models/sample:1.2.3", "--runtime-image", "registry.example/toolchain:1"]
FORMATS = {"triton": [], "kserve": IMAGES, "mlserver": [], "ovms": [], "onnx": [], "ray-serve": []}


@pytest.fixture(scope="module")
def aot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aot_release(tmp_path_factory.mktemp("aot"))


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_release(tmp_path_factory.mktemp("onnx"))


def export(format_name: str, bundle: Path, folder: Path, *options: str) -> Result:
    return CliRunner().invoke(command, [format_name, str(bundle), str(folder), *FORMATS[format_name], *options])


def refusal(format_name: str, bundle: Path, folder: Path, *options: str) -> ToolchainError:
    result = export(format_name, bundle, folder, *options)
    assert isinstance(result.exception, ToolchainError), (result.output, result.exception)
    return result.exception


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_is_the_same_bytes_each_time_and_says_what_it_wrote(name: str, onnx: Path, tmp_path: Path) -> None:
    first, second = (export(name, onnx, tmp_path / place) for place in "ab")
    assert first.exit_code == second.exit_code == 0, first.exception
    files = files_of(tmp_path / "a")
    assert files == files_of(tmp_path / "b")
    assert files
    for file, content in files.items():
        assert f"{len(content):>10} {file}\n" in first.stdout
    assert f"{tmp_path / 'a'} written: {len(files)} files" in first.stdout
    text = b"".join(content for file, content in files.items() if not file.startswith(("bundle/", "models/")))
    assert str(tmp_path).encode() not in text


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_bundle_is_not_exported(name: str, tmp_path: Path) -> None:
    release = onnx_release(tmp_path / "release")
    model = open_source(str(release)).file("model.onnx").source
    assert isinstance(model, Path)
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    error = refusal(name, release, tmp_path / "out")
    assert error.code is ExitCode.DAMAGED_BUNDLE
    assert "model.onnx" in error.what
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused_and_replaced_as_a_whole_with_force(onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    error = refusal("onnx", onnx, folder)
    assert (error.code, error.what) == (ExitCode.USAGE, "is not empty")
    assert files_of(folder) == {"mine.txt": b"mine"}
    assert export("onnx", onnx, folder, "--force").exit_code == 0
    assert "mine.txt" not in files_of(folder)
    assert "model.onnx" in files_of(folder)


def test_an_empty_folder_is_filled_and_a_file_is_refused(onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export("onnx", onnx, tmp_path / "empty").exit_code == 0
    (tmp_path / "file").write_text("")
    assert refusal("onnx", onnx, tmp_path / "file", "--force").what == "is a file; a folder is needed"


@pytest.mark.parametrize("place", ["current", "home", "repository"])
def test_force_does_not_replace_what_nobody_means(
    place: str, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "precious"
    (folder / "inner").mkdir(parents=True)
    if place == "current":
        monkeypatch.chdir(folder / "inner")
    elif place == "home":
        monkeypatch.setenv("HOME", str(folder))
    else:
        (folder / ".git").mkdir()
    assert "--force does not replace" in refusal("onnx", onnx, folder, "--force").what
    assert (folder / "inner").is_dir()


def test_a_file_that_changes_while_it_is_copied_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"changed")
    folder = tmp_path / "out"
    write_tree({"a": text_file("old")}, folder)
    changed = Blob(blob_of_bytes(b"as it was").digest, 9, tmp_path / "source")
    with pytest.raises(ToolchainError) as caught:
        write_tree({"a": text_file("new"), "b/c": changed}, folder, force=True)
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE
    assert files_of(folder) == {"a": b"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


INTERRUPTED = """
import sys
from pathlib import Path
from toolchain.bundle.layout import Blob, blob_of_bytes
from toolchain.exports.files import text_file, write_tree

folder = Path(sys.argv[1])
tree = {"a": text_file("new"), "b": Blob(blob_of_bytes(b"").digest, 0, folder / "endless")}
print("started", flush=True)
write_tree(tree, folder / "out")
"""


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")  # Opening it waits for a writer, for ever.
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["endless"]


def test_files_can_be_read_by_the_server_s_user_whatever_the_mask(onnx: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert export("triton", onnx, tmp_path / "out").exit_code == 0
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert modes == {0o755, 0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_versions_are_numbered_in_their_order() -> None:
    versions = ["0.0.1", "0.1.0", "0.999.999", "1.0.0", "1.2.3", "12.0.1"]
    numbers = [numbered(version) for version in versions]
    assert numbers == sorted(numbers)
    assert numbered("1.2.3") == 1002003
    assert numbered("1.2.3-rc.1", 7) == 7


@pytest.mark.parametrize("version", ["0.0.0", "1.2.3-rc.1", "1.2.3+build", "1.1000.0"])
def test_a_version_without_a_number_asks_for_one(version: str) -> None:
    with pytest.raises(ToolchainError, match="--version-number") as caught:
        numbered(version)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize("name", ["ovms", "onnx"])
def test_formats_of_onnx_refuse_an_engine_of_tvm(name: str, aot: Path, tmp_path: Path) -> None:
    error = refusal(name, aot, tmp_path / "out")
    assert error.code is ExitCode.USAGE
    assert error.what == f"export {name} takes ONNX models, the bundle for any holds a TVM engine"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ovms", "onnx"])
def test_formats_of_one_model_refuse_one_for_each_size(name: str, tmp_path: Path) -> None:
    error = refusal(name, onnx_release(tmp_path / "release", 1, 8), tmp_path / "out")
    assert "model-1.onnx, model-8.onnx" in error.what


def test_an_unknown_target_and_a_name_that_is_none_are_refused(onnx: Path, tmp_path: Path) -> None:
    assert "has no bundle for target 'any2' (did you mean 'any'?)" in str(
        refusal("onnx", onnx, tmp_path / "out", "--target", "any2")
    )
    assert "a model's name has" in str(refusal("onnx", onnx, tmp_path / "out", "--name", "../up"))


def test_ovms_gets_a_numbered_folder_and_a_configuration(onnx: Path, tmp_path: Path) -> None:
    assert (
        export("ovms", onnx, tmp_path / "out", "--name", "scores", "--base", "/srv/", "--threads", "2").exit_code == 0
    )
    files = files_of(tmp_path / "out")
    assert sorted(files) == ["config.json", "scores/1002003/model.onnx"]
    [entry] = json.loads(files["config.json"])["model_config_list"]
    assert entry["config"]["base_path"] == "/srv/scores"
    assert entry["config"]["plugin_config"] == {"INFERENCE_NUM_THREADS": 2}


def test_the_onnx_export_runs_in_onnxruntime_and_its_page_names_what_goes_in(onnx: Path, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    assert export("onnx", onnx, tmp_path / "out").exit_code == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    with np.load(tmp_path / "out" / "selftest.npz") as recorded:
        [scores] = session.run(None, {"image": recorded["input:image"]})
        assert np.allclose(scores, recorded["output:scores"], atol=1e-5)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| input | `image` | float32 | `[batch, 4]` |" in page
    assert "`batch` has a size from 1 to 64" in page


def test_kserve_names_image_node_and_resources(aot: Path, tmp_path: Path) -> None:
    assert export("kserve", aot, tmp_path / "out", "--memory-mb", "512", "--namespace", "models").exit_code == 0
    service = yaml.safe_load((tmp_path / "out" / "inference-service.yaml").read_text())
    predictor = service["spec"]["predictor"]
    assert service["metadata"]["namespace"] == "models"
    assert predictor["model"]["storageUri"] == "oci://registry.example/models/sample:1.2.3"
    assert predictor["model"]["resources"]["limits"] == {"cpu": "1", "memory": "512M"}
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    assert predictor["nodeSelector"] == {"kubernetes.io/os": "linux", "kubernetes.io/arch": arch}
    runtime = yaml.safe_load((tmp_path / "out" / "serving-runtime.yaml").read_text())
    assert runtime["metadata"]["name"] == predictor["model"]["runtime"]
    assert runtime["spec"]["supportedModelFormats"][0]["name"] == predictor["model"]["modelFormat"]["name"]
    assert runtime["spec"]["containers"][0]["image"] == "registry.example/toolchain:1"
    # What goes into the model's image is the bundle itself.
    assert open_source(str(tmp_path / "out" / "models")).bundle.digest == open_source(str(aot)).bundle.digest


def test_kserve_refuses_names_and_images_that_kubernetes_would(aot: Path, tmp_path: Path) -> None:
    assert refusal("kserve", aot, tmp_path / "out", "--name", "Sample").where == "--name"
    assert refusal("kserve", aot, tmp_path / "out", "--image", "sample").where == "--image"


def test_ray_serve_gets_replicas_as_asked(aot: Path, tmp_path: Path) -> None:
    options = ["--min-replicas", "2", "--max-replicas", "6", "--threads", "3"]
    assert export("ray-serve", aot, tmp_path / "out", *options).exit_code == 0
    settings = json.loads((tmp_path / "out" / "app.json").read_text())
    assert settings["autoscaling"] == {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 2.0}
    assert (settings["threads"], settings["gpus"]) == (3, 0)
    assert settings["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 4]}]
    deployed = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text())
    assert deployed["applications"][0]["import_path"] == "app:application"
    assert refusal("ray-serve", aot, tmp_path / "no", "--min-replicas", "5").where == "--max-replicas"


def test_yaml_holds_what_was_given() -> None:
    value = {"a": [], "b": {"c-d": "no", "1": [1, {"x": None, "y": [True, "z: #"]}]}, "no": {}, "e": "ü\n", "f": 1.5}
    written = yaml_file(value, {"second": 2}).source
    assert isinstance(written, bytes)
    assert list(yaml.safe_load_all(written)) == [value, {"second": 2}]
