"""Small real engines and the bundles made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.bundle.manifest import BundleManifest, RuntimeNeed, TargetInfo, Tolerance, parse_engine
from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.host import Host, detect_host

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7 - 0.5
BATCH_DIM = {"min": 1, "max": 64, "batch": True, "buckets": []}
SEQUENCE_DIM = {"min": 1, "max": 16, "batch": False, "buckets": []}
MATRIX_CONTRACT: dict[str, Any] = {
    "schema": 1,
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 4], "pad": None}],
    "outputs": [{"name": "scores", "dtype": "float32", "shape": ["batch", 3]}],
    "dims": {"batch": BATCH_DIM},
    "preprocessing": "",
}
TOKENS_CONTRACT: dict[str, Any] = {
    "schema": 1,
    "inputs": [
        {"name": "tokens", "dtype": "float32", "shape": ["batch", "sequence", 4], "pad": 0},
        {"name": "mask", "dtype": "float32", "shape": ["batch", "sequence"], "pad": 0},
    ],
    "outputs": [
        {"name": "states", "dtype": "float32", "shape": ["batch", "sequence", 3]},
        {"name": "pooled", "dtype": "float32", "shape": ["batch", 4]},
    ],
    "dims": {"batch": BATCH_DIM, "sequence": SEQUENCE_DIM},
    "preprocessing": "",
}


def expected_scores(image: np.ndarray) -> np.ndarray:
    return np.maximum(image @ WEIGHTS, 0)


def expected_tokens(tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"states": tokens @ WEIGHTS, "pooled": (tokens * mask[:, :, None]).sum(axis=1)}


def matrix_model(batch: int | str) -> onnx.ModelProto:
    """scores = relu(image @ WEIGHTS)."""
    nodes = [helper.make_node("MatMul", ["image", "W"], ["product"]), helper.make_node("Relu", ["product"], ["scores"])]
    return _model(nodes, {"image": [batch, 4]}, {"scores": [batch, 3]}, {"W": WEIGHTS})


def tokens_model(batch: int | str, sequence: int | str) -> onnx.ModelProto:
    """states = tokens @ WEIGHTS; pooled = the sum of the tokens under the mask."""
    nodes = [
        helper.make_node("MatMul", ["tokens", "W"], ["states"]),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["wide"]),
        helper.make_node("Mul", ["tokens", "wide"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["pooled"], keepdims=0),
    ]
    constants = {"W": WEIGHTS, "axis": np.array([2]), "one": np.array([1])}
    inputs = {"tokens": [batch, sequence, 4], "mask": [batch, sequence]}
    return _model(nodes, inputs, {"states": [batch, sequence, 3], "pooled": [batch, 4]}, constants)


def _model(nodes: Sequence[Any], inputs: Mapping, outputs: Mapping, constants: Mapping) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_engine(
    folder: Path,
    contract: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, int]],
    backend: str = "onnxruntime",
) -> Path:
    """Write engine.json and contract.json; the engine files are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = {
        "schema": 1,
        "backend": backend,
        "precision": "fp32",
        "device": "cpu",
        "variants": [{"file": file, "sizes": dict(sizes)} for file, sizes in variants.items()],
    }
    (folder / "engine.json").write_text(json.dumps(engine))
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def matrix_engine(folder: Path, batches: Sequence[int] = ()) -> Path:
    """An ONNX Runtime engine of :func:`matrix_model`: one of any batch size, or one for each of ``batches``."""
    folder.mkdir(parents=True, exist_ok=True)
    variants: dict[str, dict[str, int]] = {f"model-{b}.onnx": {"batch": b} for b in batches} or {"model.onnx": {}}
    for file, sizes in variants.items():
        onnx.save(matrix_model(sizes.get("batch", "batch")), folder / file)
    return write_engine(folder, MATRIX_CONTRACT, variants)


def requirements(features: Sequence[str] = (), arch: str = "", cuda: str | None = None) -> dict[str, Any]:
    return {
        "os": "linux",
        "arch": arch or detect_host().arch,
        "cpu_features": list(features),
        "libc": {"name": "glibc", "min": "2.17"},
        "cuda_arch": cuda,
    }


def bundle_spec(engine: Path, target: str = "any", needs: Mapping[str, Any] | None = None, **files: Path) -> BundleSpec:
    """A bundle of the engine in ``engine``, with further ``files``: name with ``_`` for ``.`` -> file."""
    info = parse_engine(json.loads((engine / "engine.json").read_text()), "engine.json")
    need = RuntimeNeed("onnxruntime", ">=1.17,<2", "CPUExecutionProvider")
    manifest = BundleManifest(
        name="sample",
        version="1.0.0",
        description="a small sample",
        target=TargetInfo(target, {"name": target, "cpu": {"model": target}}),
        requirements=requirements() if needs is None else needs,
        engine=info,
        runtime=need if info.backend == "onnxruntime" else RuntimeNeed("apache-tvm", ">=0.27,<0.28"),
        contract=json.loads((engine / "contract.json").read_text()),
        tools={"onnx": onnx.__version__},
        reasons=("it is the only one",),
        selftest=Tolerance(cosine=0.999, max_abs_error=1e-4),
    )
    named = {p.name: p for p in sorted(engine.iterdir())}
    return BundleSpec(manifest, named | {name.replace("_", "."): path for name, path in files.items()})


def sample_release(folder: Path, engine: Path, targets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """A release with a bundle of ``engine`` for each of ``targets`` (name -> requirements)."""
    specs = [bundle_spec(engine, name, needs) for name, needs in (targets or {"any": requirements()}).items()]
    pack_release("sample", "1.0.0", [pack_bundle(spec) for spec in specs], folder)
    return folder


def host_with(**changes: Any) -> Host:
    """This machine with some attributes changed."""
    return replace(detect_host(), **changes)
