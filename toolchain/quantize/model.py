"""Reading, preparing, writing and running ONNX models within the quantization stages."""

from __future__ import annotations

import contextlib
import heapq
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.graph.numeric import WITHOUT_SPINNING

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]

MODEL, CONTRACT = "model.onnx", "contract.json"
_PROTOBUF_LIMIT = 1_900_000_000  # protobuf refuses messages over 2 GiB; the graph itself needs room too
_LARGE = 1024  # bytes of a weight that is kept from the type inference
_FLOATS = (1, 10, 11, 16)  # float32, float16, float64, bfloat16
_INFERRED = "onnx.infer"  # ONNX Runtime's quantizers look for this mark before inferring types once more


def load_prepared(folder: Path) -> onnx.ModelProto:
    """The model of an ``onnx`` artifact, ready for the quantizers.

    Constant nodes become initializers (quantizers find weights only there), every node has a name of its
    own, and the types of all values are inferred.

    Raises:
        ToolchainError: QUANTIZE when the file can't be read.
    """
    return prepared(load_graph(folder))


def load_graph(folder: Path, weights: bool = True) -> onnx.ModelProto:
    """The model of an ``onnx`` artifact as it is, or without the ``weights`` that lie in a file of their own.

    Raises:
        ToolchainError: QUANTIZE when the file can't be read.
    """
    import onnx

    try:
        return onnx.load(str(folder / MODEL), load_external_data=weights)
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, OSError: no common base
        raise ToolchainError(f"cannot be read: {error}", where=MODEL, code=ExitCode.QUANTIZE) from error


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` made ready for the quantizers, see :func:`load_prepared`; changed on the way."""
    _constants_to_initializers(model.graph)
    _name_nodes(model.graph)
    model = infer_types(model)
    model.metadata_props.add(key=_INFERRED, value="onnxruntime.quant")
    return model


def infer_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with inferred types; changed on the way.

    The inference gets the graph without the values of its float weights: no shape depends on them, it copies
    what it gets three times over, and with them a model may be too large for one protobuf message.
    """
    import onnx

    held: dict[int, bytes] = {}
    for number, tensor in enumerate(model.graph.initializer):
        if len(tensor.raw_data) > _LARGE and tensor.data_type in _FLOATS:
            held[number] = tensor.raw_data
            tensor.ClearField("raw_data")
    inferred = onnx.shape_inference.infer_shapes(model)
    for number, data in held.items():
        inferred.graph.initializer[number].raw_data = data
    return inferred


def byte_limit_exceeded(model: onnx.ModelProto) -> bool:
    """Whether the model is too large for one protobuf message."""
    return byte_size(model) >= _PROTOBUF_LIMIT


def byte_size(model: onnx.ModelProto) -> int:
    """Bytes of the initializers, which is the size of a model for all practical purposes."""
    return sum(len(i.raw_data) or i.ByteSize() for i in model.graph.initializer)


def write_model(model: onnx.ModelProto, folder: Path) -> Path:
    """Write ``model.onnx`` (weights in model.onnx.data when they exceed protobuf's limit); returns its path.

    Equal models give equal bytes.
    """
    import onnx

    path = folder / MODEL
    unmark(model)
    if byte_limit_exceeded(model):
        onnx.save(model, str(path), save_as_external_data=True, location=MODEL + ".data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def unmark(model: onnx.ModelProto) -> None:
    """Take away the mark of :func:`prepared`, which is nobody's business outside."""
    kept = [p for p in model.metadata_props if p.key != _INFERRED]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def copy_contract(source: Path, target: Path) -> None:
    """contract.json as it is: quantization changes neither inputs nor outputs."""
    shutil.copyfile(source / CONTRACT, target / CONTRACT)


def open_session(path: Path, *, int8_activations: bool = False, optimized: Path | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        path: the model file.
        int8_activations: let s8 activations fuse as ONNX Runtime does on ARM.  On x86 it keeps Add, Mul and Concat
            apart, which gives the same accuracy, faster there.
        optimized: where to write the graph that really runs (extended level, no hardware-specific layouts).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*WITHOUT_SPINNING)
    if int8_activations:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimized is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def session_of(model: onnx.ModelProto) -> Iterator[Any]:
    """A session of a model in memory; its temporary file lives as long as the context."""
    import onnx

    with tempfile.TemporaryDirectory() as temporary:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        yield open_session(write_model(copy, Path(temporary)))


def run_session(session: Any, feed: dict[str, Array]) -> dict[str, Array]:
    """Outputs by name; inputs that the graph no longer has are left out."""
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    values = session.run(names, {name: array for name, array in feed.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def sample_feed(folder: Path, calibration: Path | None = None) -> dict[str, Array]:
    """One batch of inputs: the first one of the calibration data, else made up from the contract.

    Made up: floats from a normal distribution with a fixed seed, integers 1, bools true.
    """
    import numpy as np

    from toolchain.data import read_batches
    from toolchain.specs import Signature

    if calibration is not None:
        for batch in read_batches(calibration):
            return dict(batch.inputs)
    signature = Signature.from_contract(json.loads((folder / CONTRACT).read_text()))
    sizes, rng = signature.example_sizes(), np.random.default_rng(0)
    feed: dict[str, Array] = {}
    for spec in signature.inputs:
        shape, dtype = spec.concrete(sizes), np.dtype(spec.dtype)
        feed[spec.name] = rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)
    return feed


def find_problem(path: Path, feed: dict[str, Array], reference: dict[str, Array] | None = None) -> str:
    """Why a written model can't be used, or ``""``: it is checked, opened, run, and looked through for NaN.

    Args:
        path: the model file.
        feed: inputs to run it on.
        reference: the float model's outputs on ``feed``; NaN where it has a number is a problem.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
        outputs = run_session(open_session(path), feed)
    except Exception as error:  # ONNX Runtime raises a class per status, all derived from Exception alone
        return " ".join(str(error).split())
    if reference is not None:
        import numpy as np

        for name, wanted in reference.items():
            broken = ~np.isfinite(outputs[name]) & np.isfinite(wanted)
            if wanted.dtype.kind == "f" and broken.any():
                return f"output {name!r} has {int(broken.sum())} NaN or infinite values where the float model has none"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantizers' prints and warnings out of the output: standard output is for results."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def sort_topologically(graph: onnx.GraphProto) -> None:
    """Kahn's algorithm; among ready nodes the earlier one goes first, so that the order is determined."""
    nodes = list(graph.node)
    makers = {output: number for number, node in enumerate(nodes) for output in node.output if output}
    waiting: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        needed = {makers[name] for name in (*node.input, *captured(node)) if name in makers}
        waiting.append(needed)
        for maker in needed:
            readers.setdefault(maker, []).append(number)
    ready = [number for number, needed in enumerate(waiting) if not needed]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers.get(order[-1], []):
            waiting[reader].discard(order[-1])
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if order != list(range(len(nodes))) and len(order) == len(nodes):
        copies = [type(nodes[i]).FromString(nodes[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(copies)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        values = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        if not values:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(values[0])
        tensor.name = node.output[0]
    if len(kept) != len(graph.node):
        nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def captured(node: onnx.NodeProto) -> list[str]:
    """Values of the outer graph that the subgraphs of ``node`` may read (all names they read)."""
    found: list[str] = []
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found += [*inner.input, *captured(inner)]
    return found
