"""Lowest and highest values of a graph's tensors, one batch after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.graph.numeric import session
from toolchain.quantize.model import byte_limit_exceeded, write_model
from toolchain.quantize.scheme import INT8_OPS

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

_FLOATS = (1, 10)  # float32, float16


def calibrated_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the float32 and float16 values that operators with an int8 form read or write, sorted.

    As ``select_tensors_to_calibrate`` of ONNX Runtime's calibrators; weights are none of them.
    """
    graph = model.graph
    values = (*graph.value_info, *graph.output, *graph.input)
    floats = {v.name for v in values if v.type.tensor_type.elem_type in _FLOATS}
    touched = {name for n in graph.node if n.op_type in INT8_OPS for name in (*n.input, *n.output)}
    return sorted(touched & floats - {i.name for i in graph.initializer})


class RangeFinder:
    """Runs a model on batches and keeps the extremes of its calibrated tensors.

    The graph gets a ReduceMin and a ReduceMax right behind each tensor's producer, so that no tensor lives
    longer than it would without them, and is run without graph optimizations.

    Args:
        model: with inferred types, not changed.
        folder: for the graph's file, where it is too large for one protobuf message.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._tensors = calibrated_tensors(model)
        augmented = _augmented(model, self._tensors)
        large = byte_limit_exceeded(augmented)
        self._session = session(write_model(augmented, folder) if large else augmented.SerializeToString())
        self._own = [output.name for output in model.graph.output]
        self._extremes: list[NDArray[Any]] = []

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs that the graph has."""
        return frozenset(i.name for i in self._session.get_inputs())

    def add(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch; the model's own outputs on it.  NaN in a tensor stays NaN in its range."""
        import numpy as np

        values = self._session.run(None, dict(feed))
        extremes = [value.reshape(-1) for value in values[len(self._own) :]]
        if self._extremes:
            both = zip(self._extremes, extremes, strict=True)
            extremes = [(np.maximum if i % 2 else np.minimum)(old, new) for i, (old, new) in enumerate(both)]
        self._extremes = extremes
        return dict(zip(self._own, values[: len(self._own)], strict=True))

    def ranges(self) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """(lowest, highest) by tensor name, each an array of one element; empty before the first batch."""
        lows, highs = self._extremes[::2], self._extremes[1::2]
        return dict(zip(self._tensors, zip(lows, highs, strict=True), strict=bool(lows)))


def _augmented(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy with two more outputs for each tensor, lowest and highest value, in the order of ``tensors``."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
    used = {name for n in graph.node for name in (*n.input, *n.output, n.name)} | set(types)
    prefix = "range"
    while any(name.startswith(prefix) for name in used):
        prefix += "_"
    numbers = {name: number for number, name in enumerate(tensors)}

    def measure(name: str) -> None:
        for kind in ("ReduceMin", "ReduceMax"):
            output = f"{prefix}{numbers[name]}{kind}"
            # Sizes of zero can only be reduced with keepdims.
            graph.node.append(onnx.helper.make_node(kind, [name], [output], name=output, keepdims=1))

    del graph.node[:]
    for value in graph.input:
        if value.name in numbers:
            measure(value.name)
    for node in model.graph.node:
        graph.node.add().CopyFrom(node)
        for name in node.output:
            if name in numbers:
                measure(name)
    for number, name in enumerate(tensors):
        for kind in ("ReduceMin", "ReduceMax"):
            graph.output.append(onnx.helper.make_tensor_value_info(f"{prefix}{number}{kind}", types[name], None))
    return copy
