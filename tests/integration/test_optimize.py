"""The optimize stage on exported models, and on a graph that its optimizer breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export_support import BATCH, IMAGE, export_model, run_stage
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec
from toolchain.stages import optimize


def write_model(folder: Path, model: onnx.ModelProto, contract: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def unfolded_cnn(folder: Path) -> Path:
    """Conv, batch norm, Relu, a constant subgraph, a dead branch and an unused input: what exporters leave."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int, positive: bool = False) -> onnx.TensorProto:
        values = random.uniform(0.5, 2, shape) if positive else random.standard_normal(shape)
        return numpy_helper.from_array(values.astype(np.float32), name)

    weights = [weight("w", 4, 1, 3, 3), weight("bias", 4), weight("scale", 4), weight("shift", 4), weight("mean", 4),
               weight("var", 4, positive=True), weight("one", 1), weight("two", 1)]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "w", "bias"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "scale", "shift", "mean", "var"], ["norm"], name="norm"),
        helper.make_node("Relu", ["norm"], ["relu"], name="relu"),
        helper.make_node("Add", ["one", "two"], ["three"], name="constant"),
        helper.make_node("Mul", ["relu", "three"], ["out"], name="mul"),
        helper.make_node("Exp", ["relu"], ["dead"], name="dead"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8]),
            helper.make_tensor_value_info("unused", TensorProto.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        weights,
    )
    contract = {
        "schema": 1,
        "inputs": [
            {"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8], "pad": None},
            {"name": "unused", "dtype": "float32", "shape": ["batch"], "pad": None},
        ],
        "outputs": [{"name": "out", "dtype": "float32", "shape": ["batch", 4, 8, 8]}],
        "dims": {"batch": {"min": 1, "max": 16, "batch": True, "buckets": []}},
        "preprocessing": "",
    }
    return write_model(
        folder, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), contract
    )


def run_model(folder: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, inputs)


def test_batch_norm_constants_and_dead_nodes_go_and_the_contract_stays(tmp_path: Path) -> None:
    source = unfolded_cnn(tmp_path / "in")
    facts = run_stage(optimize, optimize.Options(), tmp_path / "out", tmp_path, onnx=source)
    result = tmp_path / "out" / "onnx"
    assert facts["kept"] == ""
    assert facts["nodes_before"] == 6
    assert facts["operators"] == {"Conv": 1, "Mul": 1, "Relu": 1}
    assert facts["operators_before"]["BatchNormalization"] == 1
    assert 0 < facts["max_abs_error"] < 1e-4
    assert (result / "contract.json").read_bytes() == (source / "contract.json").read_bytes()
    assert [i.name for i in onnx.load(result / "model.onnx").graph.input] == ["image", "unused"]
    image = np.random.default_rng(3).standard_normal((5, 1, 8, 8)).astype(np.float32)
    inputs = {"image": image, "unused": np.zeros(5, np.float32)}
    np.testing.assert_allclose(run_model(result, inputs)[0], run_model(source, inputs)[0], atol=1e-4)


def test_without_fusions_the_batch_norm_stays(tmp_path: Path) -> None:
    source = unfolded_cnn(tmp_path / "in")
    facts = run_stage(optimize, optimize.Options(fusions=False), tmp_path / "out", tmp_path, onnx=source)
    assert facts["operators"]["BatchNormalization"] == 1
    assert "Exp" not in facts["operators"]


@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer", "nested", "dict_out"])
def test_exported_models_keep_dynamic_dimensions_and_results(tmp_path: Path, name: str) -> None:
    x4 = InputSpec("x", "float32", ("batch", 4))
    tokens = (
        InputSpec("ids", "int64", ("batch", "sequence"), low=0, high=99),
        InputSpec("mask", "int64", ("batch", "sequence"), low=1, high=1),
    )
    inputs = {"cnn": (IMAGE,), "lstm": (InputSpec("x", "float32", ("batch", 6, 5)),), "transformer": tokens}
    dims = (BATCH, DimSpec("sequence", 1, 40))
    exported = export_model(tmp_path, name, inputs=inputs.get(name, (x4,)), dims=dims)
    options = optimize.Options(inputs=exported.options.inputs)
    facts = run_stage(optimize, options, tmp_path / "out", tmp_path, onnx=exported.folder)
    assert facts["kept"] == ""
    assert facts["nodes"] <= facts["nodes_before"]
    assert not [op for op in facts["operators"] if ":" in op]
    before = onnx.load(exported.folder / "model.onnx").graph
    after = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    assert list(after.input) == list(before.input)
    assert [o.name for o in after.output] == [o.name for o in before.output]


def test_bytes_do_not_depend_on_the_run_or_the_hash_seed(tmp_path: Path) -> None:
    exported = export_model(tmp_path, "cnn", inputs=(IMAGE,), dims=(BATCH,))
    code = (
        "import sys; from pathlib import Path; from toolchain.stage import StageContext; "
        "from toolchain.stages import optimize; out = Path(sys.argv[2]); out.mkdir(); "
        "optimize.run(StageContext({'onnx': Path(sys.argv[1])}, optimize.Options(), out, out)); "
        "assert 'torch' not in sys.modules"
    )
    results = []
    for seed in ("1", "2"):
        out = tmp_path / f"run-{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", code, exported.folder, out], check=True, env=environment)
        results.append((out / "onnx" / "model.onnx").read_bytes())
    assert results[0] == results[1]


def foreign_operator(folder: Path, domain: str) -> Path:
    """A graph with an operator that no runtime knows."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mystery", ["x"], ["y"], domain=domain)],
        "g",
        [value("x", TensorProto.FLOAT, ["batch"])],
        [value("y", TensorProto.FLOAT, ["batch"])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    contract = {
        "schema": 1,
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch"], "pad": None}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
        "dims": {"batch": {"min": 1, "max": 4, "batch": True, "buckets": []}},
        "preprocessing": "",
    }
    return write_model(folder, helper.make_model(graph, opset_imports=opsets, ir_version=8), contract)


def test_a_graph_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    source = foreign_operator(tmp_path / "in", "made.up")
    with pytest.raises(ToolchainError) as caught:
        run_stage(optimize, optimize.Options(), tmp_path / "out", tmp_path, onnx=source)
    assert caught.value.code is ExitCode.OPTIMIZE
    assert "Mystery" in caught.value.what


def test_a_graph_that_the_optimizer_cannot_keep_right_is_kept_and_the_reason_given(tmp_path: Path) -> None:
    source = unfolded_cnn(tmp_path / "in")
    # No small graph is known that onnxslim breaks, so the contract is the side that is made wrong here.
    contract = json.loads((source / "contract.json").read_text())
    contract["outputs"][0]["shape"] = ["batch", 4, 8, 9]
    (source / "contract.json").write_text(json.dumps(contract))
    facts = run_stage(optimize, optimize.Options(), tmp_path / "out", tmp_path, onnx=source)
    assert "changed the contract" in facts["kept"]
    assert facts["nodes"] == facts["nodes_before"] == 6
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
