"""Matrix products with constant weights: rows flattened, weights packed at compile time."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.products_int8 import product_int8
from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, dtype_of, operator_of, shape_of
from toolchain.tvm.loops import OUT_FUSIBLE
from toolchain.tvm.loops.dense import dense, pack_matrix
from toolchain.tvm.machine import Machine


def flatten_rows() -> Any:
    """A pass: a product of more than two axes with a constant matrix becomes one of two, between two reshapes."""
    return graph_pass("flatten_rows", _Flatten)


class _Flatten:
    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        from tvm import relax

        if operator_of(value) != "relax.matmul":
            return value
        weights = constant_of(graph.definition(value.args[1]))
        shape = shape_of(value.args[0])
        if weights is None or weights.ndim != 2 or shape is None or len(shape) < 3:
            return value
        rows: Any = 1
        for size in shape[:-1]:
            rows = rows * size
        flat = graph.emit(relax.op.reshape(value.args[0], relax.ShapeExpr([rows, shape[-1]])))
        product = graph.emit(relax.Call(value.op, [flat, value.args[1]], value.attrs, value.ty_args))
        return relax.op.reshape(product, relax.ShapeExpr([*shape[:-1], weights.shape[1]]))


def pack_products(machine: Machine) -> Any:
    """A pass: products of (m, k) with a constant (k, n) become packed loop nests."""
    return graph_pass("pack_products", lambda: _Pack(machine))


class _Pack:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        from tvm import relax

        if operator_of(value) != "relax.matmul":
            return value
        weights, shape = constant_of(graph.definition(value.args[1])), shape_of(value.args[0])
        dtype = dtype_of(value.args[0])
        if weights is None or weights.ndim != 2 or shape is None or len(shape) != 2:
            return value
        if dtype in ("int8", "uint8"):
            made = product_int8(graph, value, self._machine)
            return value if made is None else made
        sums = dtype_of(graph.builder.normalize(value))
        if dtype not in ("float32", "float16") or sums not in (dtype, "float32"):
            return value
        lanes = self._machine.lanes(sums)
        tile = self._machine.choose(sums, shape, weights.shape).tile
        packed = relax.const(pack_matrix(weights, lanes, tile.vectors), dtype)
        return graph.builder.call_te(
            lambda x, w: dense(x, w, weights.shape[1], tile, sums),
            value.args[0],
            packed,
            primfunc_name_hint="dense",
            primfunc_attrs={"op_pattern": OUT_FUSIBLE},
        )
