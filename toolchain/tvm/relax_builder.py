"""TVM's graph importer with this package's converters asked first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import Refusal, load_tvm, one_line
from toolchain.tvm.operators import Converter, OpNode, Unsupported, converters
from toolchain.tvm.operators.expand import qualified
from toolchain.tvm.operators.fold import fold

if TYPE_CHECKING:
    import onnx

_TAKES_SHAPES = frozenset({
    "Reshape", "Resize", "ConstantOfShape", "Gather", "Slice", "Shape", "Expand", "Concat", "Equal", "Where", "Cast",
    "CastLike", "Squeeze",
})  # fmt: skip
"""Operators whose converters handle Relax shapes; others get a tensor."""

_ONE_TUPLE = frozenset({
    "Optional", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "ConcatFromSequence", "SplitToSequence",
})  # fmt: skip
"""Operators whose single output may be a tuple."""


def build_relax(model: onnx.ModelProto) -> Any:
    """The Relax module of a checked model.

    Raises:
        Refusal: a node can't be converted; the text names it.
    """
    load_tvm()
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map

    combined = type("_Importer", (_Walker, ONNXGraphImporter), {"own": converters(), "theirs": _get_convert_map()})
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    importer: Any = combined(_empty_shapes(model.graph), "float32", keep_params_in_input=False)
    module = importer.from_onnx(model.graph, opset)
    _check_constants(module["main"])
    return module


class _Walker:
    """Walks the nodes in place of TVM's importer, with which it is combined: each error names its node.

    Attributes:
        bb: the block builder.
        opset: version of the default operator set.
        own: converters of this package.
        theirs: TVM's converter classes.
    """

    bb: Any
    opset: int
    own: Mapping[str, Converter]
    theirs: Mapping[str, Any]
    _nodes: dict[str, Any]
    _params: Any
    _parse_attr: Callable[[Any], dict[str, Any]]
    _parse_array: Callable[[Any], Any]
    _convert_subgraph: Callable[[Any, Any], Any]

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Done before, with the nodes' names."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            try:
                self._construct_node(node)
            except Refusal:
                raise
            except Unsupported as error:
                raise Refusal(f"operator {node.op_type} (node {node.name!r}): {error}") from error
            except Exception as error:
                raise Refusal(
                    f"TVM can't import operator {node.op_type} (node {node.name!r}): {one_line(error)}"
                ) from error

    def _construct_node(self, node: onnx.NodeProto) -> None:
        results = self._convert(node)
        if len(results) < len(node.output):
            raise Unsupported(f"TVM gives {len(results)} of {len(node.output)} outputs")
        self._nodes.update((name, value) for name, value in zip(node.output, results, strict=False) if name)

    def _convert(self, node: onnx.NodeProto) -> Sequence[Any]:
        attrs = self._parse_attr(node.attribute)
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        converter = self.own.get(qualified(node))
        takes_shapes = node.op_type in _TAKES_SHAPES
        given = [self._nodes[name] if name else None for name in node.input]
        folded = fold(node, given, self.opset)
        if folded is not None:
            return folded
        inputs = _onnx_inputs(given if takes_shapes else [_as_tensor(self.bb, value) for value in given])
        result = self._call(node, converter, inputs, attrs)
        if node.op_type in _ONE_TUPLE:
            return [result]
        return _unpacked(self.bb, result)

    def _call(self, node: onnx.NodeProto, converter: Converter | None, inputs: Any, attrs: dict[str, Any]) -> Any:
        def convert(attributes: Mapping[str, Any]) -> Any:
            """As TVM does."""
            if node.op_type == "If":
                return self._convert_if(inputs[0], attributes)
            function = self.theirs[node.op_type].get_converter(self.opset)
            return function(self.bb, inputs, dict(attributes), [self._nodes, self._params])

        if converter is None:
            result = convert(attrs)
        else:
            op = OpNode(self.bb, node.op_type, inputs, attrs, self.opset, len(node.output), convert, self._inline)
            result = converter(op)
        return self.bb.normalize(result)

    def _convert_if(self, condition: Any, attrs: Mapping[str, Any]) -> Any:
        from tvm import relax

        branches = [
            relax.SeqExpr(blocks=[], body=self._convert_subgraph(self.bb, attrs[f"{name}_branch"]))
            for name in ("then", "else")
        ]
        return self.bb.emit(relax.If(condition, *branches))

    def _inline(self, graph: onnx.GraphProto, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a graph inside the model, its nodes converted here and now."""
        outer = self._nodes
        self._nodes = {**outer, **dict(zip((i.name for i in graph.input), inputs, strict=True))}
        try:
            for tensor in graph.initializer:
                self._nodes[tensor.name] = relax_constant(self._parse_array(tensor))
            self._construct_nodes(graph)
            return [self._nodes[output.name] for output in graph.output]
        finally:
            self._nodes = outer


def relax_constant(tensor: Any) -> Any:
    """A Relax constant of a runtime tensor."""
    from tvm import relax

    return relax.const(tensor)


def _check_constants(function: Any) -> None:
    """A constant without elements can be compiled, but not be loaded again."""
    from tvm import ir, relax

    empty: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, ir.GenericConst) and 0 in expr.value.shape:
            empty.append(expr)

    relax.analysis.post_order_visit(function, visit)
    if empty:
        raise Refusal("a constant without elements can't be stored in a TVM library")


def _onnx_inputs(values: Sequence[Any]) -> Any:
    from tvm.relax.frontend.onnx.onnx_frontend import onnx_input

    inputs = onnx_input()
    inputs.extend(values)
    return inputs


def _as_tensor(builder: Any, value: Any) -> Any:
    """``value``, a tensor if it is a Relax shape: constant if static."""
    from tvm import relax

    from toolchain.tvm.operators.node import constant_value

    if not isinstance(value, relax.Expr) or not isinstance(value.ty, relax.ShapeType):
        return value
    constant = constant_value(value)
    return relax.const(constant) if constant is not None else builder.emit(relax.op.shape_to_tensor(value))


def _unpacked(builder: Any, result: Any) -> Sequence[Any]:
    from tvm import relax

    if isinstance(result, relax.Tuple):
        return list(result)
    if isinstance(result.ty, relax.TupleType):
        return [builder.emit(relax.TupleGetItem(result, i)) for i in range(len(result.ty.fields))]
    return [result]


def _empty_shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Shapes of inputs without elements: TVM takes a size of 0 for an unknown one."""
    shapes = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims) and any(d.dim_value == 0 for d in dims):
            shapes[value.name] = [d.dim_value for d in dims]
    return shapes
