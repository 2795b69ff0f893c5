"""Operators that neither TVM nor this package converts, replaced by the function bodies that ONNX defines them by."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def has_body(node: onnx.NodeProto, opset: int) -> bool:
    """Whether ONNX defines ``node``'s operator as a function of others, in version ``opset`` of its domain."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def expand_functions(model: onnx.ModelProto, known: Collection[str]) -> onnx.ModelProto:
    """``model`` with operators outside ``known`` replaced by their bodies; ``model`` itself if there are none.

    Functions that the model brings along are inlined too.
    """
    from onnx import inliner

    versions = {o.domain: o.version for o in model.opset_import}
    seen: set[tuple[str, str]] = set()
    for _ in range(_MAX_DEPTH):
        wanted = {
            (node.domain, node.op_type)
            for node in all_nodes(model.graph)
            if qualified(node) not in known and has_body(node, versions.get(node.domain, 1))
        }
        if not wanted - seen:
            break
        seen |= wanted
        model = inliner.inline_selected_functions(model, sorted(wanted), inline_schema_functions=True)
    return inliner.inline_local_functions(model) if model.functions else model


_MAX_DEPTH = 8
"""Bodies that use functions again: more levels than any operator has."""


def qualified(node: onnx.NodeProto) -> str:
    """The operator's name, with its domain unless that is the default one."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)
