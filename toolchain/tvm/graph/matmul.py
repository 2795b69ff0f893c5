"""Matrix products of two computed operands become tiled loop nests where the plain one would stay slow."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.attention import view
from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import dtype_of, operator_of, shape_of
from toolchain.tvm.loops import OUT_FUSIBLE
from toolchain.tvm.loops.matmul import product
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import ceil_div, choose_tile

_MANY = 64
"""Rows and columns assumed where their number is known only at run time."""

_FEW = 2
"""Up to so many rows packing costs as much as the product, unless columns are ragged."""


def computed_products(machine: Machine) -> Any:
    """The pass."""
    return graph_pass("computed_products", lambda: _Products(machine))


class _Products:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        if operator_of(value) != "relax.matmul":
            return value
        result = graph.builder.normalize(value)
        shape, a, b = shape_of(result), shape_of(value.args[0]), shape_of(value.args[1])
        if shape is None or not a or not b or len(a) < 2 or len(b) < 2:
            return value
        stored = {dtype_of(operand) for operand in value.args}
        if not stored <= {"float32", "float16"} or dtype_of(result) != "float32" or 0 in (*a, *b):
            return value
        *outer, m, n = shape
        lanes = self._machine.lanes("float32")
        if n == 1 or (isinstance(m, int) and m <= _FEW and isinstance(n, int) and n % lanes == 0):
            return value
        batch = [f"b{i}" for i in range(len(outer))]
        left = view(graph, value.args[0], (*_batch_axes(batch, a), "m", "k"))
        right = view(graph, value.args[1], (*_batch_axes(batch, b), "k", "n"))
        depth = a[-1] if isinstance(a[-1], int) else _MANY
        room = self._machine.room(depth, "float32")
        vectors = ceil_div(n if isinstance(n, int) else _MANY, lanes)
        tile = choose_tile(m if isinstance(m, int) else _MANY, vectors, room)
        return graph.builder.call_te(
            lambda x, w: product(x, w, (left.axes, right.axes), batch, tile, lanes),
            left.source,
            right.source,
            primfunc_name_hint="product",
            primfunc_attrs={"op_pattern": OUT_FUSIBLE},
        )


def _batch_axes(batch: list[str], shape: list[Any]) -> list[str | int]:
    """Names of an operand's axes before the last two; 0 where it broadcasts."""
    names = batch[len(batch) - (len(shape) - 2) :]
    return [0 if isinstance(size, int) and size == 1 else name for name, size in zip(names, shape[:-2], strict=True)]
