"""Matrix products of 8-bit rows with constant 8-bit weights: weights packed for the target's instruction."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.graph.blocked_int8 import matching
from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import constant_of, dtype_of, shape_of
from toolchain.tvm.intrinsics import QUAD
from toolchain.tvm.loops import OUT_FUSIBLE
from toolchain.tvm.loops.conv_int8 import pairs_fit
from toolchain.tvm.loops.dense_int8 import dense_int8, pack_matrix
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import ceil_div, choose_tile


def product_int8(graph: Graph, call: Any, machine: Machine) -> Any:
    """The int32 product of 8-bit (m, k) and constant s8 (k, n) as a packed loop nest, or None."""
    import numpy as np
    from tvm import relax

    weights, shape = constant_of(graph.definition(call.args[1])), shape_of(call.args[0])
    if weights is None or str(weights.dtype) != "int8" or shape is None:
        return None
    if dtype_of(graph.builder.normalize(call)) != "int32":
        return None
    dot, lanes = machine.dot(), machine.lanes("int32")
    quad = QUAD if dot else 1
    source, _, shift = matching(graph, call.args[0], dot)
    depth, columns = weights.shape
    if depth % quad:
        source = graph.emit(relax.op.nn.pad(source, [0, 0, 0, ceil_div(depth, quad) * quad - depth]))
    vectors = ceil_div(columns, lanes)
    rows = shape[0] if isinstance(shape[0], int) else None
    tile = choose_tile(rows, vectors, machine.room(ceil_div(depth, quad), "int32"))
    packed = pack_matrix(weights, lanes, tile.vectors, quad)
    pairs = pairs_fit(packed)
    made = graph.builder.call_te(
        lambda x, w: dense_int8(x, w, columns, tile, pairs),
        source,
        relax.const(packed, "int8"),
        primfunc_name_hint="dense_int8",
        primfunc_attrs={"op_pattern": OUT_FUSIBLE},
    )
    by = shift * weights.astype(np.int64).sum(0)
    return relax.op.add(graph.emit(made), relax.const(by.astype(np.int32), "int32")) if by.any() else made
