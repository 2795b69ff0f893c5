"""Small ONNX models with contracts, and the compile stages run in real workers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import ToolchainError
from toolchain.worker import WorkerPool

if TYPE_CHECKING:
    from toolchain.tvm.compare import Library
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.pipeline import Notes

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
BATCH = {"batch": {"min": 1, "max": 64, "batch": True, "buckets": []}}

X86_V3 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": 2}
X86_V4 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4", "num-cores": 2}


def cortex(name: str, *features: str) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": name, "mattr": list(features), "num-cores": 4}


@dataclass
class Ran:
    """What a stage did: its facts and the engine's folder, or a refusal, or an error."""

    facts: dict[str, Any]
    engine: Path
    refused: str = ""
    error: ToolchainError | None = None

    @property
    def description(self) -> dict[str, Any]:
        return json.loads((self.engine / "engine.json").read_text())


class Graph:
    """Collects the parts of a small model and writes it with its contract."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = np.random.default_rng(seed)

    def add(self, operator: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "", **attrs: Any) -> str:
        """Adds a node; returns the name of its first output."""
        name = name or f"{operator.lower()}_{len(self.nodes)}"
        names = [f"{name}_out{i or ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attrs))
        return names[0]

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self._generator.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def save(
        self,
        folder: Path,
        inputs: Mapping[str, tuple[str, list[int | str]]],
        outputs: Mapping[str, tuple[str, list[int | str | None] | None]],
        dims: Mapping[str, Any],
        pads: Mapping[str, float] | None = None,
    ) -> Path:
        """Writes model.onnx and contract.json into ``folder``, made new."""
        folder.mkdir(parents=True)
        graph = helper.make_graph(
            [*self.nodes],
            "model",
            [helper.make_tensor_value_info(n, ONNX_TYPES[d], s) for n, (d, s) in inputs.items()],
            [helper.make_tensor_value_info(n, ONNX_TYPES[d], s) for n, (d, s) in outputs.items()],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.save(model, folder / "model.onnx")
        contract = {
            "schema": 1,
            "inputs": [{"name": n, "dtype": d, "shape": s, "pad": (pads or {}).get(n)} for n, (d, s) in inputs.items()],
            "outputs": [{"name": n, "dtype": d, "shape": s or []} for n, (d, s) in outputs.items()],
            "dims": dict(dims),
            "preprocessing": "",
        }
        (folder / "contract.json").write_text(json.dumps(contract))
        return folder


def save_unary(
    folder: Path, graph: Graph, result: str, shape: list[int | str], out: list[int | str | None] | None
) -> Path:
    """A model of one float32 input ``x`` and one output."""
    graph.nodes.append(helper.make_node("Identity", [result], ["y"], name="last"))
    dims = BATCH if "batch" in shape else {}
    return graph.save(folder, {"x": ("float32", shape)}, {"y": ("float32", out)}, dims)


def digits_cnn(folder: Path) -> Path:
    """Two convolutions, pooling, a dense layer and softmax over 8x8 images; dynamic batch."""
    g = Graph()
    x = g.add("Conv", "x", g.weight(16, 1, 3, 3, scale=0.4), g.weight(16, scale=0.1), pads=[1] * 4)
    x = g.add("MaxPool", g.add("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = g.add("Conv", x, g.weight(32, 16, 3, 3, scale=0.1), g.weight(32, scale=0.1), pads=[1] * 4)
    x = g.add("MaxPool", g.add("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = g.add("Gemm", g.add("Flatten", x), g.weight(10, 128, scale=0.1), g.weight(10), transB=1)
    return save_unary(folder, g, g.add("Softmax", x, axis=-1), ["batch", 1, 8, 8], ["batch", 10])


def attention(folder: Path, buckets: list[int]) -> Path:
    """One masked self-attention layer over token ids; the mask is built by a chain that needs the length.

    ids, mask: int64 (batch, sequence); output: (batch, sequence, 16).
    """
    g = Graph()
    width, heads = 16, 2
    ids = g.add("Gather", g.weight(50, width), "ids")
    shape = g.add("Shape", "ids")
    length = g.add("Gather", shape, g.constant(np.array([1])))
    positions = g.add("Range", g.constant(np.array(0)), g.add("Squeeze", length), g.constant(np.array(1)))
    x = g.add("Add", ids, g.add("Gather", g.weight(128, width), positions))
    split = g.add("Concat", shape, g.constant(np.array([heads, width // heads])), axis=0)
    q, k, v = (
        g.add("Transpose", g.add("Reshape", g.add("MatMul", x, g.weight(width, width, scale=0.3)), split), perm=perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )
    keep = g.add("Unsqueeze", g.add("Cast", "mask", to=TensorProto.FLOAT), g.constant(np.array([1, 2])))
    drop = g.add("Sub", g.constant(np.float32(1)), keep)
    scores = g.add("Add", g.add("MatMul", q, k), g.add("Mul", drop, g.constant(np.float32(-1e4))))
    mixed = g.add("Transpose", g.add("MatMul", g.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    merged = g.add("Reshape", mixed, g.add("Concat", shape, g.constant(np.array([width])), axis=0))
    y = g.add("LayerNormalization", g.add("Add", x, merged), g.weight(width), g.weight(width), axis=-1)
    g.nodes.append(helper.make_node("Identity", [y], ["y"], name="last"))
    dims = {
        "batch": {"min": 1, "max": 4, "batch": True, "buckets": [1, 2]},
        "sequence": {"min": 1, "max": 16, "batch": False, "buckets": buckets},
    }
    tokens = ("int64", ["batch", "sequence"])
    outputs = {"y": ("float32", ["batch", "sequence", width])}
    return g.save(folder, {"ids": tokens, "mask": tokens}, outputs, dims, {"ids": 0, "mask": 0})


def compiled(model: onnx.ModelProto, machine: Machine, dump: Path | None = None) -> tuple[Library, Notes]:
    """``model`` compiled for ``machine``, linked and loaded here; how its loops were scheduled is in the notes."""
    from toolchain.tvm.compare import Library
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.link import Linker, link_executable
    from toolchain.tvm.pipeline import Notes, compile_module

    notes = Notes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        executable = compile_module(import_model(model), machine, notes, dump)
        link_executable(executable, Linker("cc", machine.arch, ""), path)
        return Library(path), notes


class Stages:
    """Runs compile stages in children of one worker pool, as a build does."""

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self._pool, self._folder, self._count = pool, folder, 0

    def run(self, stage: Any, options: Any, model: Path, dump: Path | None = None, where: str = "") -> Ran:
        """``stage`` on the onnx artifact ``model``; ``where``: another parent folder for its output."""
        self._count += 1
        base = (Path(where) if where else self._folder) / f"run{self._count}"
        (base / "out").mkdir(parents=True)
        request = {
            "stage": stage.STAGE.run,
            "options_class": f"{stage.__name__}:Options",
            "options": asdict(options),
            "inputs": {"onnx": str(model)},
            "out": str(base / "out"),
            "root": str(base),
            "dump_ir": str(dump) if dump else None,
            "trace": False,
        }
        log = base / "log"
        end = self._pool.call(stage.STAGE.worker, "toolchain.stage_child:child_main", request, base / "reply", log)
        assert end.reply is not None, (end.describe(), log.read_text())
        if "error" in end.reply:
            return Ran({}, base, error=ToolchainError.from_json(end.reply["error"]))
        assert "result" in end.reply, end.reply
        result = end.reply["result"]
        leftover = sorted(p.name for p in (base / "out").iterdir())
        assert leftover in ([[]] if result["refused"] else [["engine"], ["engine", "twin"]])
        return Ran(result["facts"], base / "out" / "engine", result["refused"])


def stages(folder: Path) -> Iterator[Stages]:
    with WorkerPool() as pool:
        yield Stages(pool, folder)
