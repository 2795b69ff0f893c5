"""The compile_ort stage, in real workers."""

from __future__ import annotations

from pathlib import Path

import onnx
from tvm_support import Stages, digits_cnn

from toolchain.errors import ExitCode
from toolchain.stages import compile_ort
from toolchain.stages.compile_ort import CPU, Options


def test_the_model_is_carried_unchanged_and_loads(stages: Stages, tmp_path: Path) -> None:
    model = digits_cnn(tmp_path / "onnx")
    ran = stages.run(compile_ort, Options(CPU, "cpu", "int8-static"), model)
    assert (ran.engine / "model.onnx").read_bytes() == (model / "model.onnx").read_bytes()
    assert (ran.engine / "contract.json").read_bytes() == (model / "contract.json").read_bytes()
    assert ran.description == {
        "schema": 1,
        "backend": "onnxruntime",
        "precision": "int8-static",
        "device": "cpu",
        "variants": [{"file": "model.onnx", "sizes": {}}],
    }
    assert ran.facts["checked"] == "loads on the CPU"
    assert ran.facts["bytes"] == (model / "model.onnx").stat().st_size


def test_external_weights_travel_with_the_model(stages: Stages, tmp_path: Path) -> None:
    folder = digits_cnn(tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    ran = stages.run(compile_ort, Options(CPU, "cpu", "fp32"), folder)
    assert (ran.engine / "model.onnx.data").read_bytes() == (folder / "model.onnx.data").read_bytes()
    assert ran.facts["bytes"] > (folder / "model.onnx.data").stat().st_size


def test_the_facts_say_that_cuda_was_not_checked(stages: Stages, tmp_path: Path) -> None:
    options = Options("CUDAExecutionProvider", "cuda", "fp16")
    ran = stages.run(compile_ort, options, digits_cnn(tmp_path / "onnx"))
    assert ran.description["device"] == "cuda"
    assert ran.facts["checked"] == "loads on the CPU; CUDAExecutionProvider is not checked on this machine"


def test_a_model_that_does_not_load_is_a_compile_failure_with_the_reason(stages: Stages, tmp_path: Path) -> None:
    folder = digits_cnn(tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")
    error = stages.run(compile_ort, Options(CPU, "cpu", "fp32"), folder).error
    assert error is not None
    assert error.code == ExitCode.COMPILE
    assert "NoSuchOperator" in error.what
