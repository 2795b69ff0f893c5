"""Matrix products of 8-bit rows with constant 8-bit weights: weights packed for the target's instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.blocked_int8 import matching
from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import constant_of, dtype_of, shape_of
from toolchain.tvm.intrinsics import NEON, OCTET, PAIR, QUAD, grouping
from toolchain.tvm.loops import OUT_FUSIBLE, i8mm
from toolchain.tvm.loops.conv_int8 import products_fit
from toolchain.tvm.loops.dense_int8 import dense_int8, pack_matrix
from toolchain.tvm.loops.i8mm import dense_i8mm
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import NEON_SCRATCH, ceil_div, choose_tile

if TYPE_CHECKING:
    import numpy as np


def product_int8(graph: Graph, call: Any, machine: Machine) -> Any:
    """The int32 product of 8-bit (m, k) and constant s8 (k, n) as a packed loop nest, or None."""
    import numpy as np
    from tvm import relax

    weights, shape = constant_of(graph.definition(call.args[1])), shape_of(call.args[0])
    if weights is None or str(weights.dtype) != "int8" or shape is None:
        return None
    if dtype_of(graph.builder.normalize(call)) != "int32":
        return None
    source, _, shift = matching(graph, call.args[0], machine.dot())
    rows = shape[0] if isinstance(shape[0], int) else None
    packed, nest, multiple = _packed(weights, rows, machine)
    depth = weights.shape[0]
    if depth % multiple:
        source = graph.emit(relax.op.nn.pad(source, [0, 0, 0, ceil_div(depth, multiple) * multiple - depth]))
    made = graph.builder.call_te(
        nest,
        source,
        relax.const(packed, "int8"),
        primfunc_name_hint="dense_int8",
        primfunc_attrs={"op_pattern": OUT_FUSIBLE},
    )
    by = shift * weights.astype(np.int64).sum(0)
    return relax.op.add(graph.emit(made), relax.const(by.astype(np.int32), "int32")) if by.any() else made


def _packed(weights: np.ndarray, rows: int | None, machine: Machine) -> tuple[np.ndarray, Callable[..., Any], int]:
    """Weights (k, n) for the target's instruction, the loop nest of data and them, and what k must be a multiple of."""
    dot, lanes = machine.dot(), machine.lanes("int32")
    depth, columns = weights.shape
    vectors = ceil_div(columns, lanes)
    if dot == "i8mm" and rows != 1:
        room = replace(machine.room(ceil_div(depth, QUAD), "int32"), operands=PAIR)
        tile = choose_tile(rows, vectors, room, PAIR)
        return i8mm.pack_matrix(weights, tile.vectors), lambda x, w: dense_i8mm(x, w, columns, tile), OCTET
    quad, pair = grouping(dot)
    room = machine.room(ceil_div(depth, quad), "int32")
    tile = choose_tile(rows, vectors, replace(room, operands=PAIR, scratch=NEON_SCRATCH) if dot in NEON else room)
    packed = pack_matrix(weights, lanes, tile.vectors, quad, pair)
    pairs = products_fit(packed, dot)
    return packed, lambda x, w: dense_int8(x, w, columns, tile, pairs), quad
