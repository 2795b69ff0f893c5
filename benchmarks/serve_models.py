"""Small ONNX models, and releases of them as they are or ahead of time, for what measures and tries the server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.bundle.manifest import BundleManifest, RuntimeNeed, TargetInfo, parse_engine
from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.host import detect_host

Tensors = Mapping[str, tuple[str, Sequence[int | str]]]
_BATCH = "batch"
#: The element types of the models here.
_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int8": TensorProto.INT8}


def small_model(
    nodes: Sequence[onnx.NodeProto], inputs: Tensors, outputs: Tensors, constants: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A model of a few nodes; shapes may begin with ``"batch"``."""
    values = [
        [helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)) for name, (dtype, shape) in tensors.items()]
        for tensors in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "small", values[0], values[1], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def contract_of(model: onnx.ModelProto, most: int = 64, other: int = 1 << 16) -> dict[str, Any]:
    """A contract for a model whose first dynamic axis, named batch, counts rows; any other goes up to ``other``."""
    dims: dict[str, Any] = {}
    tensors: dict[str, list[dict[str, Any]]] = {}
    for key, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        tensors[key] = []
        for value in values:
            shape: list[int | str] = []
            for dim in value.type.tensor_type.shape.dim:
                shape.append(dim.dim_param or dim.dim_value)
                if dim.dim_param:
                    batch = dim.dim_param == _BATCH
                    dims[dim.dim_param] = {"min": 1, "max": most if batch else other, "batch": batch, "buckets": []}
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            tensors[key].append({"name": value.name, "dtype": dtype, "shape": shape})
    return {"schema": 1, **tensors, "dims": dims, "preprocessing": ""}


def onnx_release(
    folder: Path, name: str, model: onnx.ModelProto, version: str = "1.0.0", images: Sequence[str] = ()
) -> Path:
    """A release ``folder/name/version`` that runs ``model`` in ONNX Runtime as it is; ``images`` names such inputs."""
    contract = contract_of(model)
    for tensor in contract["inputs"]:
        if tensor["name"] in images:
            tensor["image"] = {"scale": 1.0}
    engine = folder / f".engine-{name}-{version}"
    engine.mkdir(parents=True)
    onnx.save(model, engine / "model.onnx")
    info = {"backend": "onnxruntime", "variants": [{"file": "model.onnx", "sizes": {}}]}
    runtime = RuntimeNeed("onnxruntime", ">=1.17,<2", "CPUExecutionProvider")
    return _release(folder, name, version, engine, info, contract, runtime)


def aot_release(folder: Path, name: str, library: Path, contract: Mapping[str, Any], version: str = "1.0.0") -> Path:
    """A release ``folder/name/version`` of an engine ahead of time, which is for this machine."""
    engine = folder / f".engine-{name}-{version}"
    engine.mkdir(parents=True)
    os.link(library, engine / "model.so")
    info = {"backend": "tvm", "form": "aot", "variants": [{"file": "model.so", "sizes": {}}]}
    return _release(folder, name, version, engine, info, contract, RuntimeNeed("", ""))


def _release(
    folder: Path,
    name: str,
    version: str,
    engine: Path,
    about: Mapping[str, Any],
    contract: Mapping[str, Any],
    runtime: RuntimeNeed,
) -> Path:
    info = {"schema": 1, "precision": "fp32", "device": "cpu", **about}
    (engine / "engine.json").write_text(json.dumps(info))
    (engine / "contract.json").write_text(json.dumps(contract))
    needs = {"os": "linux", "arch": detect_host().arch, "cpu_features": [], "libc": {"name": "glibc", "min": "2.17"}}
    manifest = BundleManifest(
        name=name,
        version=version,
        description="",
        target=TargetInfo("any", {"name": "any"}),
        requirements={**needs, "cuda_arch": None},
        engine=parse_engine(info, "engine.json"),
        runtime=runtime,
        contract=contract,
        tools={"onnx": onnx.__version__},
        reasons=(),
        selftest=None,
    )
    release = folder / name / version
    release.parent.mkdir(parents=True, exist_ok=True)
    pack_release(name, version, [pack_bundle(BundleSpec(manifest, {p.name: p for p in engine.iterdir()}))], release)
    return release


def tiny() -> onnx.ModelProto:
    """One product of 16 to 16, y = x @ W: what is measured with it is the server alone."""
    weights = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "W"], ["y"])
    shape = ("float32", (_BATCH, 16))
    return small_model([node], {"x": shape}, {"y": shape}, {"W": weights})


def add_sub(dtype: str) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1 and OUTPUT1 = INPUT0 - INPUT1, rows of 16: the model of Triton's example clients."""
    wide = dtype == "int8"  # ONNX adds int8 no narrower than int32
    nodes = []
    names = ["INPUT0", "INPUT1"]
    for index, operator in enumerate(("Add", "Sub")):
        nodes.append(helper.make_node(operator, names, [f"result{index}" if wide else f"OUTPUT{index}"]))
    if wide:
        casts = [helper.make_node("Cast", [name], [f"{name}w"], to=TensorProto.INT32) for name in names]
        backs = [helper.make_node("Cast", [f"result{i}"], [f"OUTPUT{i}"], to=TensorProto.INT8) for i in range(2)]
        sums = [helper.make_node(n.op_type, [f"{name}w" for name in names], n.output) for n in nodes]
        nodes = [*casts, *sums, *backs]
    shape = (dtype, (_BATCH, 16))
    return small_model(nodes, dict.fromkeys(names, shape), {"OUTPUT0": shape, "OUTPUT1": shape}, {})


def identity(dtype: str) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0, rows of any width."""
    shape = (dtype, (_BATCH, "width"))
    return small_model(
        [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])], {"INPUT0": shape}, {"OUTPUT0": shape}, {}
    )


def classifier(source: str, output: str, classes: int) -> onnx.ModelProto:
    """Scores of one image, [3, 224, 224] without a batch axis: means of its parts, weighted by seeded numbers."""
    weights = np.random.default_rng(1).normal(size=(3 * 7 * 7, classes)).astype(np.float32)
    nodes = [
        helper.make_node("Unsqueeze", [source, "zero"], ["batched"]),
        helper.make_node("AveragePool", ["batched"], ["pooled"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Reshape", ["pooled", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "W"], ["scores"]),
        helper.make_node("Reshape", ["scores", "shape"], [output]),
    ]
    constants = {
        "W": weights,
        "zero": np.array([0]),
        "flat": np.array([1, 147]),
        "shape": np.array([classes]),
    }
    return small_model(nodes, {source: ("float32", (3, 224, 224))}, {output: ("float32", (classes,))}, constants)
