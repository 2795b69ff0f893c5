"""Counts over a stored ONNX model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


def model_facts(path: Path) -> dict[str, Any]:
    """opset, node count, histogram of operators, parameters (elements of float weights) and bytes of all files."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    operators = Counter(f"{n.domain}:{n.op_type}" if n.domain else n.op_type for n in all_nodes(model.graph))
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    return {
        "opset": next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
        "parameters": sum(_elements(t) for t in model.graph.initializer if t.data_type in floats),
        "bytes": sum(f.stat().st_size for f in path.parent.glob(path.name + "*")),
    }


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
