"""Makes the kept bundle of this version: ``golden_bundle.py tests/assets/edge-schema-S-abi-A``.

To be run once, when the schema of bundles or the interface of engines is raised; later versions must open what it made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import json

import numpy as np
import onnx
import onnxruntime
from helpers.bundle_samples import bundle_spec, requirements
from helpers.edge_samples import aot_engine
from tvm_support import BATCH, Graph

from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.data import write_npz

# What every x86-64 processor has.
TARGET = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64", "num-cores": 2}


def make(release: Path) -> None:
    """A compiled convolution and a product, of any batch, with recorded outputs of ONNX Runtime."""
    from toolchain.tvm.forms import Interface, build_library
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.pipeline import Notes

    g = Graph(7)
    x = g.add("Relu", g.add("Conv", "x", g.weight(4, 1, 3, 3), g.weight(4), pads=[1] * 4))
    x = g.add("Gemm", g.add("Flatten", g.add("GlobalAveragePool", x)), g.weight(3, 4), g.weight(3), transB=1, name="y")
    g.nodes[-1].output[0] = "y"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = g.save(
            folder / "onnx", {"x": ("float32", ["batch", 1, 8, 8])}, {"y": ("float32", ["batch", 3])}, BATCH
        )
        model, contract = onnx.load(source / "model.onnx"), json.loads((source / "contract.json").read_text())
        engine = aot_engine(folder / "engine", contract, {"model.so": {}})
        machine = Machine(TARGET, "cpu", "x86_64", 128, 16)
        linker, interface = Linker("zig", "x86_64", "2.28"), Interface(["x"], ["y"], {"batch": (1, 64)})
        build_library(import_model(model), machine, Notes(), linker, engine / "model.so", interface, "aot")
        x_given = np.random.default_rng(1).standard_normal((5, 1, 8, 8)).astype(np.float32)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": x_given})
        recorded = folder / "selftest.npz"
        write_npz(recorded, {"input:x": x_given, "output:y": y})
        needs = requirements((), "x86_64")
        pack_release("sample", "1.0.0", [pack_bundle(bundle_spec(engine, needs=needs, selftest_npz=recorded))], release)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
