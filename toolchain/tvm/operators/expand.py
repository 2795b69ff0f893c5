"""Operators that neither TVM nor this package converts, replaced by the function bodies that ONNX defines them by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN = "toolchain.expanded"
"""Domain of the functions made of bodies, until they are inlined."""

_MAX_DEPTH = 8
"""Bodies that use functions again: more levels than any operator has."""


def expand_functions(model: onnx.ModelProto, known: Collection[str]) -> onnx.ModelProto:
    """``model`` with operators outside ``known`` replaced by their bodies; ``model`` itself if there are none.

    Functions that the model brings along are inlined too.
    """
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    for _ in range(_MAX_DEPTH):
        if all(qualified(node) in known for node in model.graph.node):
            break
        named = _with_functions(model, known)
        if not named.functions:
            break
        model = inliner.inline_local_functions(named)
    return model


def _with_functions(model: onnx.ModelProto, known: Collection[str]) -> onnx.ModelProto:
    """A copy whose expandable nodes call functions of the model's own, one for each node."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    versions = {o.domain: o.version for o in model.opset_import}
    types = _types(model)
    for number, node in enumerate(copy.graph.node):
        if qualified(node) in known:
            continue
        body = _body(node, versions, types)
        if body is None:
            continue
        body.domain, body.name = DOMAIN, f"{node.op_type}_{number}"
        node.domain, node.op_type = DOMAIN, body.name
        copy.functions.append(body)
        have = {o.domain for o in copy.opset_import}
        copy.opset_import.extend(o for o in body.opset_import if o.domain not in have)
    if copy.functions:
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy


def _body(
    node: onnx.NodeProto, versions: Mapping[str, int], types: Mapping[str, onnx.TypeProto]
) -> onnx.FunctionProto | None:
    """The operator as a function, for this node's types and attributes; defaults are written into ``node``."""
    import onnx

    try:
        # Any: the package's type stubs lack the functions of schemas.
        schema: Any = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None
    given = {a.name for a in node.attribute}
    defaults = [a.default_value for name, a in schema.attributes.items() if name not in given and a.default_value.name]
    node.attribute.extend(defaults)
    newest = versions.get("", versions.get("ai.onnx", 1))
    body = onnx.FunctionProto()
    try:
        if fitting := [v for v in schema.context_dependent_function_opset_versions if v <= newest]:
            inputs = [types.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
            make = schema.get_context_dependent_function_with_opset_version
            body.ParseFromString(make(max(fitting), node.SerializeToString(), inputs))
        elif fitting := [v for v in schema.function_opset_versions if v <= newest]:
            body.ParseFromString(schema.get_function_with_opset_version(max(fitting)))
    except Exception:
        # No body for these types.
        return None
    # A body holds until the version that brings another one.
    for imported in body.opset_import:
        imported.version = versions.get(imported.domain, imported.version)
    return body if body.node else None


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """The types of values, as far as ONNX infers them."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:
        # Over 2 GB, or a node that the inference rejects.
        graph = model.graph
    types = {t.name: onnx.helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}
    types.update((value.name, value.type) for value in [*graph.value_info, *graph.input, *graph.output])
    return types


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
