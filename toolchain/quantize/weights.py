"""The large weights of a model, apart from its graph.

A graph is copied, searched and rewritten many times over; its weights are read once, a piece at a time, from the file
beside the model where there is one: models of many gigabytes need little more memory than one of their weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.graph.numeric import WITHOUT_SPINNING
from toolchain.quantize.model import MODEL, load_graph, prepared

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]

_LARGE = 1024  # bytes of a weight that is held apart
_PIECE = 1 << 22  # values that are worked on at once
_ALIGNMENT = 64  # bytes, of each weight in the file beside the model
_FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class Held:
    """A model in two parts.

    Attributes:
        model: prepared as :func:`toolchain.quantize.model.load_prepared` does; each large float32 initializer of the
            main graph has its name, type and shape, and a single 0 for data.
        weights: name -> float32 values, flat; read from the file as they are used.
        beside: whether the weights lie in a file of their own.
    """

    model: onnx.ModelProto
    weights: Mapping[str, Array]
    beside: bool


def load_held(folder: Path) -> Held:
    """The model of an ``onnx`` artifact with its weights apart.

    Raises:
        ToolchainError: QUANTIZE when the file can't be read.
    """
    model = load_graph(folder, weights=False)
    weights = _take_out(model, folder)
    beside = bool(weights) and (folder / f"{MODEL}.data").exists()
    model = prepared(model)
    weights |= _take_out(model, folder)  # constants that have become initializers
    return Held(model, weights, beside)


def _take_out(model: onnx.ModelProto, folder: Path) -> dict[str, Array]:
    import numpy as np
    from onnx.external_data_helper import _get_all_tensors, load_external_data_for_tensor, uses_external_data

    taken: dict[str, Array] = {}
    for tensor in model.graph.initializer:
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_type != _FLOAT or count * 4 <= _LARGE:
            continue
        if uses_external_data(tensor):
            where = {entry.key: entry.value for entry in tensor.external_data}
            offset = int(where.get("offset", "0"))
            taken[tensor.name] = np.memmap(folder / where["location"], np.float32, "r", offset, (count,))
            del tensor.external_data[:]
            tensor.ClearField("data_location")
        elif len(tensor.raw_data) == count * 4:
            taken[tensor.name] = np.frombuffer(tensor.raw_data, np.float32)
        else:
            continue
        tensor.raw_data = bytes(4)
    for tensor in _get_all_tensors(model):
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(folder))
    return taken


@contextlib.contextmanager
def session_of_held(model: onnx.ModelProto, weights: Mapping[str, Array]) -> Iterator[Any]:
    """An ``onnxruntime.InferenceSession`` of a graph with weights apart, on the CPU; they are not copied."""
    import onnxruntime as ort
    from onnx import TensorProto

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*WITHOUT_SPINNING)
    options.add_session_config_entry("session.disable_prepacking", "1")  # it copies every weight for a single run
    copy = type(model)()
    copy.CopyFrom(model)
    held = [tensor for tensor in copy.graph.initializer if tensor.name in weights]
    values = [ort.OrtValue.ortvalue_from_numpy(weights[t.name].reshape(tuple(t.dims))) for t in held]
    for tensor in held:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="given")
    options.add_external_initializers([tensor.name for tensor in held], values)
    yield ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])


def write_held(
    model: onnx.ModelProto, pieces: Mapping[str, Callable[[], Iterator[Array]]], folder: Path, beside: bool
) -> Path:
    """Write ``model.onnx``, with the weights in ``model.onnx.data`` if they are to lie ``beside``; returns its path.

    Args:
        model: its initializers named in ``pieces`` are filled in; changed.
        pieces: name -> the values, piece by piece.
        folder: where to write.
        beside: what does not fit into one protobuf message must.
    """
    path = folder / MODEL
    named = [tensor for tensor in model.graph.initializer if tensor.name in pieces]
    if beside:
        with open(folder / f"{MODEL}.data", "wb") as file:
            for tensor in named:
                _append(tensor, pieces[tensor.name](), file)
    else:
        for tensor in named:
            tensor.raw_data = b"".join(piece.tobytes() for piece in pieces[tensor.name]())
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _append(tensor: onnx.TensorProto, pieces: Iterator[Array], file: Any) -> None:
    from onnx import TensorProto

    file.write(bytes(-file.tell() % _ALIGNMENT))
    offset = file.tell()
    for piece in pieces:
        file.write(piece.data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", f"{MODEL}.data"), ("offset", offset), ("length", file.tell() - offset)):
        tensor.external_data.add(key=key, value=str(value))


def in_pieces(values: Array) -> Iterator[Array]:
    """``values``, flat, a few megabytes at a time."""
    for start in range(0, len(values), _PIECE):
        yield values[start : start + _PIECE]
