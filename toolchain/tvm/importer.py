"""ONNX -> Relax, refusing by name what TVM 0.27 can't import or would compute wrong."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import Refusal, load_tvm, one_line
from toolchain.tvm.operators.expand import all_nodes

if TYPE_CHECKING:
    import onnx

    from toolchain.tvm.deny import NodeView


def import_model(model: onnx.ModelProto) -> Any:
    """The Relax module of ``model``; entry ``main`` takes the graph's inputs in order, weights are constants.

    Raises:
        Refusal: an operator is unknown to TVM, known to be computed wrong, or its import failed;
            the text names the operator and the node.
    """
    from toolchain.tvm.relax_builder import build_relax

    prepared = named_nodes(prepare(model))
    check_operators(prepared)
    try:
        # The importer warns of harmless renames, and some converters print.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build_relax(prepared)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"TVM can't import the model: {one_line(error)}") from error


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the operators that nothing converts replaced by their definitions in ONNX, where they have one."""
    from toolchain.tvm.operators.expand import expand_functions

    return expand_functions(model, known_operators())


def known_operators() -> frozenset[str]:
    """Operators that TVM or this package converts; those outside the default domain as ``domain.Operator``."""
    load_tvm()
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    from toolchain.tvm.operators import converters

    # TVM looks at names alone: its Attention is com.microsoft's.
    return (frozenset(_get_convert_map()) - {"Attention"}) | frozenset(converters())


def named_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` itself, each unnamed node named after its first output."""
    for node in model.graph.node:
        if not node.name:
            node.name = next((name for name in node.output if name), node.op_type)
    return model


def check_operators(model: onnx.ModelProto) -> None:
    """Refuses before anything heavy runs.

    Raises:
        Refusal: see :func:`import_model`.
    """
    from toolchain.tvm.deny import RULES
    from toolchain.tvm.integer_products import check_integer_products
    from toolchain.tvm.operators.expand import qualified

    model = named_nodes(prepare(model))
    _check_types(model.graph)
    nodes = list(all_nodes(model.graph))
    check_integer_products(model)
    known = known_operators()
    missing: dict[str, str] = {}
    for node in nodes:
        if qualified(node) not in known:
            missing.setdefault(qualified(node), node.name)
    if missing:
        listed = ", ".join(f"{op} (node {name!r})" for op, name in sorted(missing.items()))
        raise Refusal(f"TVM has no importer for {'operator' if len(missing) == 1 else 'operators'} {listed}")
    for view in _views(model):
        for rule in RULES:
            if view.node.op_type in rule.operators and rule.applies(view):
                raise Refusal(f"operator {view.node.op_type} (node {view.node.name!r}): {rule.reason}")


def _check_types(graph: onnx.GraphProto) -> None:
    """Only tensors of numbers go in and out, of at least 8 bits and no 8-bit floating-point formats."""
    import onnx

    for value in [*graph.input, *graph.output]:
        kind = value.type.WhichOneof("value")
        if kind not in ("tensor_type", None):
            raise Refusal(f"{value.name!r} is a {kind.removesuffix('_type')}; TVM engines take and give tensors")
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            raise Refusal(f"{value.name!r} holds text; TVM engines take and give numbers")
        _check_element_type(value.type.tensor_type.elem_type, repr(value.name))
    for node in all_nodes(graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype", "output_datatype"):
                _check_element_type(attribute.i, f"operator {node.op_type} (node {node.name!r})")


def _check_element_type(element_type: int, where: str) -> None:
    import onnx

    t = onnx.TensorProto
    right = {
        t.UNDEFINED, t.FLOAT, t.FLOAT16, t.DOUBLE, t.BFLOAT16, t.BOOL, t.INT8, t.INT16, t.INT32, t.INT64, t.UINT8,
        t.UINT16, t.UINT32, t.UINT64,
    }  # fmt: skip
    if element_type not in right:
        name = t.DataType.Name(element_type)
        raise Refusal(f"{where}: TVM converts the element type {name} wrong or not at all on CPUs")


def _views(model: onnx.ModelProto) -> Iterator[NodeView]:
    """The nodes with constants, and shapes as far as ONNX infers them."""
    import onnx
    from onnx import helper, numpy_helper

    from toolchain.tvm.deny import NodeView

    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:
        # Over 2 GB, or a node that the inference rejects: the rules then see fewer shapes and stay careful.
        graph = model.graph
    shapes, dtypes = _types(graph)
    constants: dict[str, Any] = {
        t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
    }
    for tensor in graph.initializer:
        shapes[tensor.name], dtypes[tensor.name] = tuple(tensor.dims), tensor.data_type
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    read = frozenset({n for node in all_nodes(graph) for n in node.input} | {o.name for o in graph.output})
    for node in all_nodes(graph):
        attrs = {a.name: _text(helper.get_attribute_value(a)) for a in node.attribute}
        names = list(node.input)
        yield NodeView(
            node,
            attrs,
            tuple(shapes.get(n) for n in names),
            tuple(constants.get(n) for n in names),
            tuple(dtypes.get(n, 0) for n in names),
            read,
        )


def _types(graph: onnx.GraphProto) -> tuple[dict[str, tuple[int | None, ...] | None], dict[str, int]]:
    shapes: dict[str, tuple[int | None, ...] | None] = {}
    dtypes: dict[str, int] = {}
    for info in [*graph.input, *graph.output, *graph.value_info]:
        tensor = info.type.tensor_type
        dtypes[info.name] = tensor.elem_type
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            shapes[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return shapes, dtypes


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def operator_counts(model: onnx.ModelProto) -> Mapping[str, int]:
    """How many nodes of each operator ``model`` has, sorted by name."""
    counts: dict[str, int] = {}
    for node in all_nodes(model.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
