"""What ``toolchain export triton`` writes into config.pbtxt, read with the classes of Triton's schema."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from helpers.bundle_samples import MATRIX_CONTRACT, TOKENS_CONTRACT, WEIGHTS
from helpers.export_samples import aot_release, files_of, onnx_release, tokens_release

from toolchain.cli.export import command
from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.standalone import standalone_source
from toolchain.exports.triton_config import largest_batch
from toolchain.runtime.contract import parse_contract
from toolchain.runtime.server.proto import model_config_pb2 as pb


@pytest.fixture(scope="module")
def aot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return aot_release(tmp_path_factory.mktemp("aot"), 1, 8)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_release(tmp_path_factory.mktemp("onnx"))


def config_of(release: Path, folder: Path, *options: str) -> Any:
    result = CliRunner().invoke(command, ["triton", str(release), str(folder), *options])
    assert result.exit_code == 0, result.exception
    [file] = folder.glob("*/config.pbtxt")
    return text_format.Parse(file.read_text(), pb.ModelConfig())


def refusal(release: Path, folder: Path, *options: str) -> ToolchainError:
    result = CliRunner().invoke(command, ["triton", str(release), str(folder), *options])
    assert isinstance(result.exception, ToolchainError), result.exception
    return result.exception


def test_an_onnx_model_is_for_tritons_onnxruntime_backend(onnx: Path, tmp_path: Path) -> None:
    config = config_of(onnx, tmp_path / "out", "--name", "scores")
    assert (config.name, config.backend, config.default_model_filename) == ("scores", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 64
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("image", pb.TYPE_FP32, [4])]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("scores", pb.TYPE_FP32, [3])]
    assert config.version_policy.latest.num_versions == 1
    assert sorted(files_of(tmp_path / "out" / "scores" / "1002003")) == ["model.onnx"]


def test_the_recorded_inputs_warm_the_model_up(onnx: Path, tmp_path: Path) -> None:
    [warmup] = config_of(onnx, tmp_path / "out").model_warmup
    assert warmup.batch_size == 1
    entry = warmup.inputs["image"]
    assert (entry.data_type, list(entry.dims)) == (pb.TYPE_FP32, [4])
    raw = (tmp_path / "out" / "sample" / "warmup" / entry.input_data_file).read_bytes()
    assert np.array_equal(np.frombuffer(raw, "<f4"), np.linspace(-1, 1, 12, dtype=np.float32)[:4])


def test_batches_are_merged_only_where_settings_were_measured(aot: Path, tmp_path: Path) -> None:
    settings = tmp_path / "serve.toml"
    assert not config_of(aot, tmp_path / "none").HasField("dynamic_batching")
    settings.write_text("schema = 1\n[models.sample]\nmax_batch_size = 1\ninstances = 2\nthreads = 3\n")
    single = config_of(aot, tmp_path / "single", "--settings", str(settings))
    assert not single.HasField("dynamic_batching")
    assert single.instance_group[0].count == 2
    assert single.parameters["threads"].string_value == "3"
    settings.write_text(
        "schema = 1\n[defaults]\nmax_batch_size = 16\nqueue_delay_us = 250\nqueue_size = 99\ntimeout_ms = 1.5\n"
        "priorities = 3\n"
    )
    batching = config_of(aot, tmp_path / "many", "--settings", str(settings)).dynamic_batching
    assert list(batching.preferred_batch_size) == [16]
    assert batching.max_queue_delay_microseconds == 250
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    policy = batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (99, 1500)


def test_the_cache_is_on_only_when_asked_for(aot: Path, tmp_path: Path) -> None:
    assert not config_of(aot, tmp_path / "off").response_cache.enable
    assert config_of(aot, tmp_path / "on", "--response-cache").response_cache.enable


def test_labels_go_beside_the_configuration_and_must_be_as_many_as_classes(aot: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\nthree\n")
    config = config_of(aot, tmp_path / "out", "--labels", f"scores={labels}")
    assert (tmp_path / "out" / "sample" / config.output[0].label_filename).read_text() == "one\ntwo\nthree\n"
    assert "did you mean 'scores'" in refusal(aot, tmp_path / "no", "--labels", f"score={labels}").what
    labels.write_text("one\ntwo\n")
    error = refusal(aot, tmp_path / "no", "--labels", str(labels))
    assert (error.code, error.where) == (ExitCode.USAGE, "--labels")
    assert "has 2 lines, output 'scores' has 3 classes" in error.what


def test_engines_for_fixed_sizes_and_those_of_tvm_run_through_the_python_backend(aot: Path, tmp_path: Path) -> None:
    assert config_of(aot, tmp_path / "aot").backend == "python"
    assert sorted(files_of(tmp_path / "aot" / "sample" / "1002003")) == [
        "engine/b1.so",
        "engine/b8.so",
        "engine/contract.json",
        "engine/engine.json",
        "model.py",
        "toolchain_engine.py",
    ]
    config = config_of(onnx_release(tmp_path / "release", 1, 8), tmp_path / "onnx")
    assert (config.backend, config.max_batch_size) == ("python", 64)


def test_sizes_that_vary_are_open_and_nothing_recorded_means_no_warmup(tmp_path: Path) -> None:
    config = config_of(tokens_release(tmp_path / "release"), tmp_path / "out")
    assert [list(i.dims) for i in config.input] == [[-1, 4], [-1]]
    assert not config.model_warmup


def contract(base: dict[str, Any], **changes: Any) -> Any:
    data = copy.deepcopy(base)
    data["dims"]["batch"] |= changes.pop("batch", {})
    for name, shape in changes.items():
        for spec in (*data["inputs"], *data["outputs"]):
            if spec["name"] == name:
                spec["shape"] = shape
    return parse_contract(data, "contract.json")


def test_triton_knows_of_batches_only_where_every_first_axis_is_one_bounded_batch() -> None:
    assert largest_batch(contract(MATRIX_CONTRACT)) == 64
    assert largest_batch(contract(TOKENS_CONTRACT)) == 64
    assert largest_batch(contract(MATRIX_CONTRACT, batch={"batch": False})) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, batch={"max": None})) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, batch={"min": 2})) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, scores=[3, "batch"])) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, scores=["batch"])) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, scores=[3])) == 0
    assert largest_batch(contract(MATRIX_CONTRACT, image=[1, 4])) == 0


@pytest.mark.parametrize("form", ["aot", "vm", ""])
def test_the_loader_beside_an_engine_names_nothing_that_it_does_not_hold(form: str) -> None:
    source = standalone_source(form, "CPUExecutionProvider")
    assert "import toolchain" not in source
    assert "from toolchain" not in source
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "-"]
    done = subprocess.run(check, input=source, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout


def test_the_loader_runs_an_engine_where_this_package_is_not_installed(aot: Path, tmp_path: Path) -> None:
    config_of(aot, tmp_path / "out")
    folder = tmp_path / "out" / "sample" / "1002003"
    (tmp_path / "numpy").symlink_to(Path(np.__file__).parent)
    (tmp_path / "numpy.libs").symlink_to(Path(np.__file__).parents[1] / "numpy.libs")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(folder)!r}]\n"
        "from pathlib import Path; import numpy as np; import toolchain_engine as t\n"
        f"engine = t.open_folder(Path({str(folder / 'engine')!r}), 1)\n"
        "print(engine.run({'image': np.ones((11, 4), 'f')})['scores'].tolist())\n"
        "try: engine.run({'image': np.ones((1, 5), 'f')})\n"
        "except t.ToolchainError as error: print(error.code.name)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('toolchain', 'onnxruntime', 'tvm')))\n"
    )
    # Without site-packages (-S), where the package may be.
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, timeout=30)
    scores, refused, modules = done.stdout.splitlines()
    expected = np.maximum(np.ones((11, 4), np.float32) @ WEIGHTS, 0)
    assert np.allclose(eval(scores), expected, atol=1e-6), done.stderr
    assert (refused, modules) == ("BAD_INPUT", "[]")
