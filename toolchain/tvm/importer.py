"""ONNX -> Relax, refusing by name what TVM 0.27 can't import or would compute wrong."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import Refusal, load_tvm, one_line

if TYPE_CHECKING:
    import onnx

    from toolchain.tvm.deny import NodeView

QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearGlobalAveragePool", "QLinearConcat", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    "DynamicQuantizeLSTM", "MatMulNBits", "QAttention",
})  # fmt: skip
"""Operators of quantized models, in the standard domain and in com.microsoft."""


def import_model(model: onnx.ModelProto) -> Any:
    """The Relax module of ``model``; entry ``main`` takes the graph's inputs in order, weights are constants.

    Raises:
        Refusal: an operator is quantized, unknown to TVM, known to be computed wrong, or its import failed;
            the text names the operator and the node.
    """
    check_operators(model)
    load_tvm()
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    seen: list[tuple[str, str]] = []

    class _Importer(ONNXGraphImporter):  # type: ignore[misc]
        """Remembers which node is being converted: TVM's own errors don't say."""

        def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
            seen.append((op_name, attrs["tvm_custom"]["name"]))
            return super()._convert_operator(op_name, inputs, attrs, opset)

    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    try:
        # The importer prints the failing operator with all its inputs, and warns of harmless renames.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Importer({}, "float32", keep_params_in_input=False).from_onnx(named_nodes(model).graph, opset)
    except Exception as error:
        at = f"operator {seen[-1][0]} (node {seen[-1][1]!r})" if seen else "the model"
        raise Refusal(f"TVM can't import {at}: {one_line(error)}") from error


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
    load_tvm()
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    from toolchain.tvm.deny import RULES

    nodes = list(_all_nodes(named_nodes(model).graph))
    for node in nodes:
        if node.op_type in QUANTIZED:
            raise Refusal(
                f"operator {node.op_type} (node {node.name!r}): TVM imports quantized operators as float32 "
                "arithmetic: an int8 engine would compute in fp32; not offered until integer lowering exists"
            )
    known = set(_get_convert_map()) | {"If", "Constant"}
    missing: dict[str, str] = {}
    for node in nodes:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        if name not in known:
            missing.setdefault(name, node.name)
    if missing:
        listed = ", ".join(f"{op} (node {name!r})" for op, name in sorted(missing.items()))
        raise Refusal(f"TVM has no importer for {'operator' if len(missing) == 1 else 'operators'} {listed}")
    for view in _views(model):
        for rule in RULES:
            if view.node.op_type in rule.operators and rule.applies(view):
                raise Refusal(f"operator {view.node.op_type} (node {view.node.name!r}): {rule.reason}")


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)


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
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    read = frozenset({n for node in _all_nodes(graph) for n in node.input} | {o.name for o in graph.output})
    for node in _all_nodes(graph):
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
    for node in _all_nodes(model.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
