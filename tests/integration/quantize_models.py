"""Small ONNX models and datasets for the quantization tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.data import Batch, write_batches, write_outputs
from toolchain.stage import StageContext, StageResult

Arrays = dict[str, np.ndarray]


def floats(seed: int, *shape: int, scale: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def write_onnx(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Arrays,
    inputs: dict[str, tuple[str, list[int | str]]],
    outputs: dict[str, list[int | str]],
    opset: int = 18,
) -> Path:
    """An ``onnx`` artifact folder; every input's first axis is named "batch"."""
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    graph = helper.make_graph(
        list(nodes),
        "model",
        [helper.make_tensor_value_info(n, types[dtype], shape) for n, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    contract = {
        "schema": 1,
        "inputs": [{"name": n, "dtype": d, "shape": s, "pad": None} for n, (d, s) in inputs.items()],
        "outputs": [{"name": n, "dtype": "float32", "shape": s} for n, s in outputs.items()],
        "dims": {"batch": {"min": 1, "max": 4096, "batch": True, "buckets": []}},
        "preprocessing": "",
    }
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def cnn(folder: Path, seed: int = 0) -> Path:
    """Conv-Relu-Conv-Relu-MaxPool-Flatten-Gemm on 1x8x8 images, 10 logits."""
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("MaxPool", ["r2"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "fc", transB=1),
    ]
    weights = {
        "w1": floats(seed + 1, 8, 1, 3, 3), "b1": floats(seed + 2, 8),
        "w2": floats(seed + 3, 8, 8, 3, 3), "b2": floats(seed + 4, 8),
        "w3": floats(seed + 5, 10, 128), "b3": floats(seed + 6, 10),
    }  # fmt: skip
    return write_onnx(folder, nodes, weights, {"image": ("float32", ["batch", 1, 8, 8])}, {"logits": ["batch", 10]})


def mlp_with_outlier(folder: Path) -> Path:
    """Three MatMul layers; the middle one's activation has one channel 20000 times larger than the others.

    Its u8 scale leaves the other channels no levels, and the next layer cancels the large channel: whoever
    quantizes there loses all the information.
    """
    width = 16
    w2 = floats(12, width, width)
    w2[:, 0] = 0
    b2 = np.zeros(width, np.float32)
    b2[0] = 2e4
    w3 = floats(13, width, width)
    w3[0] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"], "fc1"),
        helper.make_node("Relu", ["h1"], ["a1"], "relu1"),
        helper.make_node("MatMul", ["a1", "w2"], ["h2"], "fc2"),
        helper.make_node("Add", ["h2", "b2"], ["s2"], "bias2"),
        helper.make_node("MatMul", ["s2", "w3"], ["h3"], "fc3"),
        helper.make_node("Relu", ["h3"], ["a3"], "relu3"),
        helper.make_node("MatMul", ["a3", "w4"], ["y"], "fc4"),
    ]
    weights = {"w1": floats(11, 8, width), "w2": w2, "b2": b2, "w3": w3, "w4": floats(14, width, 4)}
    return write_onnx(folder, nodes, weights, {"x": ("float32", ["batch", 8])}, {"y": ["batch", 4]})


def dataset(folder: Path, batches: Iterable[tuple[Arrays, Arrays]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_batches(folder, (Batch(i, labels, len(next(iter(i.values())))) for i, labels in batches))
    return folder


def random_data(folder: Path, name: str, shape: tuple[int, ...], batches: int = 4, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    return dataset(folder, (({name: rng.standard_normal(shape).astype(np.float32)}, {}) for _ in range(batches)))


def run_onnx(model: Path) -> Callable[[Arrays], Arrays]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


def reference(folder: Path, model: Path, data: Path) -> Path:
    """Outputs of a float model on a dataset, as a ``reference`` artifact."""
    from toolchain.data import read_batches

    folder.mkdir(parents=True, exist_ok=True)
    run = run_onnx(model / "model.onnx")
    write_outputs(folder, (run(dict(batch.inputs)) for batch in read_batches(data)))
    return folder


def run_stage(stage: Any, out: Path, options: Any, **inputs: Path) -> StageResult:
    out.mkdir(parents=True, exist_ok=True)
    result: StageResult = stage.run(StageContext(inputs, options, out, out))
    return result


def masked_attention(folder: Path) -> Path:
    """MatMuls, a Softmax over scores and an int64 mask that a Cast makes float32 and -1e9 hides with."""
    nodes = [
        helper.make_node("Cast", ["mask"], ["fmask"], "cast_mask", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["fmask", "one"], ["hidden"], "sub"),
        helper.make_node("Mul", ["hidden", "large"], ["bias"], "scale_mask"),
        helper.make_node("MatMul", ["x", "wq"], ["q"], "query"),
        helper.make_node("Transpose", ["x"], ["xt"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "xt"], ["scores"], "scores_matmul"),
        helper.make_node("Add", ["scores", "bias"], ["masked"], "add_mask"),
        helper.make_node("Softmax", ["masked"], ["weights"], "softmax"),
        helper.make_node("MatMul", ["weights", "x"], ["y"], "mix"),
    ]
    weights = {"one": np.array([1], np.float32), "large": np.array([1e9], np.float32), "wq": floats(1, 8, 8)}
    inputs: dict[str, tuple[str, list[int | str]]] = {
        "x": ("float32", ["batch", 6, 8]),
        "mask": ("int64", ["batch", 1, 6]),
    }
    return write_onnx(folder, nodes, weights, inputs, {"y": ["batch", 6, 8]})
