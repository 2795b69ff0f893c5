"""Engines of TVM's virtual machine, compiled from small ONNX models, in bundles that carry TVM's run-time."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from helpers.bundle_samples import bundle_spec, requirements, write_engine
from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.data import write_npz

LIBRARIES = {
    "runtime/libtvm_ffi.so": "tvm_ffi/lib/libtvm_ffi.so",
    "runtime/libtvm_runtime.so": "tvm/lib/libtvm_runtime.so",
}
CONTRACT = {
    "schema": 1,
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "pad": None}],
    "outputs": [
        {"name": "y", "dtype": "float32", "shape": [None]},
        {"name": "z", "dtype": "float32", "shape": ["batch", 4]},
    ],
    "dims": {"batch": {"min": 1, "max": 8, "batch": False, "buckets": []}},
}
X = np.array([[1, 0, 2, 0], [0, 0, 0, 3], [4, 5, 0, 0]], np.float32)
"""An input; its largest value is the size of the output y of :func:`model`."""
WHERE_CONTRACT = {
    "schema": 1,
    "inputs": [{"name": "x", "dtype": "float32", "shape": [3, 4], "pad": None}],
    "outputs": [{"name": "y", "dtype": "int64", "shape": [2, None]}],
    "dims": {},
}


def installed() -> Path:
    """Where this machine's packages are."""
    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def model() -> onnx.ModelProto:
    """y: as many sevens as the largest value of x says; z = abs(x)."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["whole", "first"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["y"], value=numpy_helper.from_array(np.array([7], np.float32))),
        helper.make_node("Abs", ["x"], ["z"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4]),
    ]
    constants = [numpy_helper.from_array(np.array([0], np.int64), "first")]
    graph = helper.make_graph(nodes, "sizes", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def where_model(kind: str = "NonZero") -> onnx.ModelProto:
    """y: the indices of what is not 0 in x; or another operator with one output of unknown size."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT64, [2, "n"])]
    if kind == "Unique":
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"])], "where", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def compiled(path: Path, arch: str, cpu: str, bits: int, of: onnx.ModelProto | None = None) -> Path:
    """The library of :func:`model`, or of another one, for a processor."""
    from toolchain.tvm.forms import Interface, build_library
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.link import Linker
    from toolchain.tvm.pipeline import Machine, Notes

    machine = Machine({"kind": "llvm", "mtriple": f"{arch}-linux-gnu", "mcpu": cpu}, "cpu", arch, bits, 16, 32)
    source = of or model()
    interface = Interface(["x"], [output.name for output in source.graph.output], {"batch": (1, 8)})
    built = build_library(import_model(source), machine, Notes(), Linker("zig", arch, "2.28"), path, interface, "auto")
    assert built.name == "vm"
    return path


def vm_release(
    folder: Path, library: Path, arch: str, packages: Path | None, contract: Mapping[str, Any] | None = None
) -> Path:
    """A release of one bundle of the engine ``library``, with TVM's run-time from ``packages``."""
    engine = folder / "engine"
    write_engine(engine, contract or CONTRACT, {"model.so": {}}, "tvm")
    description = json.loads((engine / "engine.json").read_text()) | {"form": "vm"}
    (engine / "engine.json").write_text(json.dumps(description))
    shutil.copy(library, engine / "model.so")
    recorded = {"input:x": X, "output:y": np.full(5, 7, np.float32), "output:z": np.abs(X)}
    if contract is WHERE_CONTRACT:
        recorded = {"input:x": X, "output:y": np.stack(X.nonzero())}
    write_npz(folder / "selftest.npz", recorded)
    spec = bundle_spec(engine, "any", requirements((), arch), selftest_npz=folder / "selftest.npz")
    libraries = {name: packages / place for name, place in LIBRARIES.items()} if packages is not None else {}
    packed = pack_bundle(BundleSpec(spec.manifest, {**spec.files, **libraries}))
    pack_release("sample", "1.0.0", [packed], folder / "r")
    return folder / "r"
