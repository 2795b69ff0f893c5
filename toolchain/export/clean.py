"""An ONNX graph in the form that ships: declared names and shapes, nothing that depends on the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import InputSpec, Signature

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_LIMIT = 2**31 - 2**26
"""Bytes of weights beyond which they go to ``model.onnx.data``: protobuf holds 2 GiB, with room for the graph."""


def shape_up(model: ir.Model, signature: Signature, order: Sequence[str], outputs: Sequence[tuple[int, str]]) -> None:
    """Change ``model`` in place: no metadata; inputs in the declared order, named and shaped as declared;
    the chosen outputs under their names; no unused nodes; no name used twice.

    Args:
        model: the graph as converted.
        signature: the declared inputs and dimensions.
        order: the declared name of each of the graph's inputs, in the graph's order.
        outputs: (index among the graph's outputs, final name), in order.

    Raises:
        ToolchainError: EXPORT when two declared dimensions are one in the model.
    """
    strip(model)
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    if len(inputs) != len(order):
        raise ToolchainError(
            f"the converted graph has {len(inputs)} inputs where {len(order)} are declared ({', '.join(order)})",
            where="model.inputs",
            hint="remove inputs that the model does not use",
            code=ExitCode.EXPORT,
        )
    by_name = dict(zip(order, inputs, strict=True))
    _choose_outputs(model, [index for index, _ in outputs])
    _remove_unused(model)
    _rename(graph, {**by_name, **{name: graph.outputs[i] for i, (_, name) in enumerate(outputs)}})
    _rename_dims(graph, signature, by_name)
    graph.inputs[:] = [by_name[name] for name in signature.names]


def strip(model: ir.Model) -> None:
    """Remove metadata, doc strings and source locations everywhere; sort the opset imports."""
    import onnx_ir.passes.common as passes

    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.name = "main"
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    imports = dict(sorted(model.graph.opset_imports.items()))
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update(imports)


def save(model: ir.Model, path: Path, external_limit: int | None = None) -> None:
    """Write ``path``, with weights in ``<path>.data`` beside it when they exceed ``external_limit`` bytes.

    The limit is :data:`EXTERNAL_LIMIT` where none is given.
    """
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    limit = EXTERNAL_LIMIT if external_limit is None else external_limit
    ir.save(model, path, external_data=path.name + ".data" if weights > limit else None)


def _choose_outputs(model: ir.Model, indices: Sequence[int]) -> None:
    """Keep the outputs at ``indices``; one that repeats, or is an input or a weight, gets an Identity of its own."""
    import onnx_ir as ir

    graph = model.graph
    chosen = [graph.outputs[index] for index in indices]
    graph.outputs.clear()
    taken: set[int] = set()
    for value in chosen:
        if value.producer() is None or id(value) in taken:
            node = ir.node("Identity", [value])
            graph.append(node)
            copy = node.outputs[0]
            copy.name, copy.shape, copy.type = f"{value.name}__copy_{len(taken)}", value.shape, value.type
            value = copy
        taken.add(id(value))
        graph.outputs.append(value)


def _remove_unused(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)


def _rename(graph: ir.Graph, wanted: Mapping[str, ir.Value]) -> None:
    """Give values their final names; internal values that bear one of these names are renamed first."""
    used = {value.name for value in _values(graph)} | set(wanted)
    for value in list(_values(graph)):
        if value.name and value.name in wanted and wanted[value.name] is not value:
            number = 0
            while (free := f"{value.name}__{number}") in used:
                number += 1
            used.add(free)
            value.name = free
    for name, value in wanted.items():
        value.name = name


def _rename_dims(graph: ir.Graph, signature: Signature, inputs: Mapping[str, ir.Value]) -> None:
    """Declared names for the graph's symbols, in every annotated shape; declared shapes on the inputs."""
    import onnx_ir as ir

    names: dict[str, int | str] = {}
    for spec in signature.inputs:
        for declared, actual in zip(fixed_shape(spec, signature), inputs[spec.name].shape or (), strict=False):
            if isinstance(actual, ir.SymbolicDim) and actual.value:
                _unify(names, str(actual.value), declared, spec)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for spec in signature.inputs:
        inputs[spec.name].shape = ir.Shape(fixed_shape(spec, signature))


def fixed_shape(spec: InputSpec, signature: Signature) -> list[int | str]:
    """The declared shape, with dimensions of one possible size as that size."""
    shape: list[int | str] = []
    for axis in spec.shape:
        one_size = isinstance(axis, str) and signature.dims[axis].min == signature.dims[axis].max
        shape.append(signature.dims[axis].min if isinstance(axis, str) and one_size else axis)
    return shape


def _unify(names: dict[str, int | str], symbol: str, declared: int | str, spec: InputSpec) -> None:
    if names.setdefault(symbol, declared) != declared:
        raise ToolchainError(
            f"the dimensions {names[symbol]!r} and {declared!r} are one and the same in the model",
            where=f"model.inputs {spec.name!r}",
            hint="declare both axes with one name",
            code=ExitCode.EXPORT,
        )


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, int | str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = str(dim.value)
    if text in names:
        return names[text]
    symbols = re.findall(r"[A-Za-z_]\w*", text)
    if any(isinstance(names.get(symbol), int) for symbol in symbols):
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda match: str(names.get(match.group(), match.group())), text)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values of the graph and its subgraphs, each once."""
    import onnx_ir as ir

    seen: set[int] = set()
    graphs: dict[int, ir.Graph] = {id(graph): graph}
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    for node in nodes:
        for attribute in node.attributes.values():
            inner = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
            inner = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else inner
            graphs |= {id(g): g for g in inner}
    owned = [v for g in graphs.values() for v in (*g.inputs, *g.initializers.values())]
    for value in (*owned, *(v for node in nodes for v in node.outputs)):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
