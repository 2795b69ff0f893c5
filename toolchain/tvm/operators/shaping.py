"""Operators that move elements: depth to space and back, concatenation, broadcasting, splits, windows of images."""

from __future__ import annotations

import math
from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, static_shape


def _space_to_depth(node: OpNode) -> Any:
    """Blocks of height and width into channels: DCR puts a block's place before the channel, CRD after it."""
    from tvm import relax

    if node.text("mode", "DCR") == "DCR":
        return node.default()
    op, block = relax.op, node.integer("blocksize", 1)
    n, c, h, w = node.shape(0)
    split = op.reshape(node.input(0), (n, c, h // block, block, w // block, block))
    moved = op.permute_dims(split, [0, 1, 3, 5, 2, 4])
    return op.reshape(moved, (n, c * block * block, h // block, w // block))


def _concat(node: OpNode) -> Any:
    """Inputs without elements leave nothing behind, and can't be stored."""
    from tvm import relax

    filled = [value for value in node.inputs if not _is_empty(value)]
    if len(filled) == len(node.inputs) or not filled:
        return node.default()
    if len(filled) == 1:
        return filled[0]
    return relax.op.concat(filled, node.axis("axis", 0, int(filled[0].ty.ndim)))


def _is_empty(value: Any) -> bool:
    try:
        return 0 in static_shape(value, "")
    except Unsupported:
        return False


def _expand(node: OpNode) -> Any:
    """Broadcast both ways: a size of 1 in the given shape keeps the input's size."""
    from tvm import relax

    from toolchain.tvm.operators.node import constant_value

    known, given = constant_value(node.input(1)), node.input(1)
    if known is None and not isinstance(given, relax.ShapeExpr):
        raise Unsupported("the shape must be constant")
    shape = getattr(node.input(0).ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        raise Unsupported("the shape of its input is only known at run time")
    target = list(given.values) if known is None else known.tolist()
    sizes = [int(size) if hasattr(size, "value") else size for size in shape.values]
    wanted = [int(size) if hasattr(size, "value") or isinstance(size, int) else size for size in target]
    rank = max(len(sizes), len(wanted))
    padded = ([1] * (rank - len(each)) + each for each in (sizes, wanted))
    both = [_broadcast(*pair) for pair in zip(*padded, strict=True)]
    return relax.op.broadcast_to(node.input(0), relax.ShapeExpr(both))


def _broadcast(size: Any, wanted: Any) -> Any:
    """The size that both become.

    Raises:
        Unsupported: that depends on sizes at run time.
    """
    import tvm

    if isinstance(size, int) and size == 1:
        return wanted
    if isinstance(size, int) or (isinstance(wanted, int) and wanted == 1):
        return size
    if not tvm.sym.Analyzer().can_prove_equal(size, wanted):
        raise Unsupported(f"whether {size} or {wanted} is 1 is only known at run time")
    return size


def _col2im(node: OpNode) -> Any:
    """Sums the blocks of columns (n, c * block, positions) where they overlap, into (n, c, image...)."""
    from tvm import te, tirx

    image = [int(v) for v in node.constant(1, "image_shape")]
    block = [int(v) for v in node.constant(2, "block_shape")]
    rank = len(image)
    strides, dilations = (list(node.attrs.get(k, [1] * rank)) for k in ("strides", "dilations"))
    pads = list(node.attrs.get("pads", [0] * (2 * rank)))
    counts = [
        (image[i] + pads[i] + pads[i + rank] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(rank)
    ]

    def compute(x: Any) -> Any:
        taps = [te.reduce_axis((0, b), f"k{i}") for i, b in enumerate(block)]

        def at(n: Any, c: Any, *place: Any) -> Any:
            row, column, inside = c, 0, []
            for i in range(rank):
                start = place[i] + pads[i] - taps[i] * dilations[i]
                index = tirx.floordiv(start, strides[i])
                inside += [tirx.floormod(start, strides[i]) == 0, index >= 0, index < counts[i]]
                row, column = row * block[i] + taps[i], column * counts[i] + index
            zero = tirx.const(0, x.dtype)
            return te.sum(tirx.if_then_else(tirx.all(*inside), x[n, row, column], zero), axis=taps)

        channels = x.shape[1] // math.prod(block)
        return te.compute((x.shape[0], channels, *image), at, name="col2im")

    return node.emit_te(compute, node.input(0), name="col2im")


def _reverse_sequence(node: OpNode) -> Any:
    """Along time_axis, the first sequence_lens[b] elements of batch b backwards."""
    from tvm import te, tirx

    batch, time = node.integer("batch_axis", 1), node.integer("time_axis", 0)

    def compute(x: Any, lengths: Any) -> Any:
        def at(*i: Any) -> Any:
            length = tirx.min(tirx.Cast("int64", lengths[i[batch]]), tirx.Cast("int64", x.shape[time]))
            step = tirx.Cast("int64", i[time])
            back = tirx.if_then_else(step < length, length - 1 - step, step)
            return x(*(back if axis == time else value for axis, value in enumerate(i)))

        return te.compute(x.shape, at, name="reverse_sequence")

    return node.emit_te(compute, node.input(0), node.input(1), name="reverse_sequence")


def _tensor_scatter(node: OpNode) -> Any:
    """The cache (batch, ...) with update written at write_indices[batch] along an axis, circular or linear."""
    from tvm import relax, te, tirx

    cache, update = node.inputs[:2]
    rank = node.rank(0)
    axis = node.axis("axis", -2, rank)
    circular = node.text("mode", "linear") == "circular"
    indices = node.input(2) if node.has(2) else relax.op.zeros((node.shape(0)[0],), "int64")

    def compute(past: Any, new: Any, starts: Any) -> Any:
        size, count = past.shape[axis], new.shape[axis]

        def at(*i: Any) -> Any:
            offset = tirx.Cast("int64", i[axis]) - starts[i[0]]
            if circular:
                offset = tirx.floormod(offset, tirx.Cast("int64", size))
            inside = tirx.all(offset >= 0, offset < tirx.Cast("int64", count))
            place = [offset if a == axis else value for a, value in enumerate(i)]
            return tirx.if_then_else(inside, new(*place), past(*i))

        return te.compute(past.shape, at, name="tensor_scatter")

    return node.emit_te(compute, cache, update, node.emit(indices), name="tensor_scatter")


def _split(node: OpNode) -> Any:
    """Parts without elements, which TVM's split does not make."""
    from tvm import relax

    sizes = node.attrs.get("split")
    if sizes is None and node.has(1):
        sizes = [int(v) for v in node.constant(1, "split")]
    if not sizes or 0 not in sizes:
        return node.default()
    axis = node.axis("axis", 0, node.rank(0))
    parts, start = [], 0
    for size in sizes:
        parts.append(node.emit(relax.op.strided_slice(node.input(0), [axis], [start], [start + size])))
        start += size
    return relax.Tuple(parts)


def _reshape(node: OpNode) -> Any:
    """A size that was computed, a number, as the only entry of a list of sizes."""
    import tvm
    from tvm import relax

    from toolchain.tvm.operators.node import constant_value

    if not isinstance(node.input(0).ty, tvm.ir.PrimType):
        return node.default()
    target = constant_value(node.input(1))
    if target is None or target.tolist() not in ([1], [-1]):
        raise Unsupported("a size known only at run time can't have this shape")
    return relax.ShapeExpr([node.input(0)])


def _div(node: OpNode) -> Any:
    """Of sizes, rounded down, as the sizes of convolutions are: ONNX rounds towards 0, which is the same from 0 on."""
    import tvm
    from tvm import tirx

    from toolchain.tvm.operators.node import constant_value

    size, divisor = node.input(0), constant_value(node.input(1))
    if not tvm.ir.is_prim_expr(size) or divisor is None or divisor.size != 1 or int(divisor.reshape(())) < 1:
        return node.default()
    analyzer = tvm.sym.Analyzer()
    for variable in tirx.analysis.undefined_vars(size, []):
        analyzer.bind(variable, tvm.ir.Range(0, 1 << 40))
    if not analyzer.can_prove(size >= 0):
        return node.default()
    return tirx.floordiv(size, tirx.const(int(divisor.reshape(())), "int64"))


def _range(node: OpNode) -> Any:
    """Up to a size of the model, one by one: as long as that size says, where TVM makes up a size of its own."""
    import tvm
    from tvm import relax

    from toolchain.tvm.operators.node import constant_value

    start, step = (constant_value(node.input(index)) for index in (0, 2))
    limit = node.input(1)
    whole = start is not None and str(start.dtype) == "int64" and start.size == 1 and int(start.reshape(())) == 0
    if not whole or step is None or int(step.reshape(())) != 1 or not tvm.ir.is_prim_expr(limit):
        return node.default()
    return relax.op.arange(0, limit, 1, "int64")


CONVERTERS: dict[str, Converter] = {
    "Col2Im": _col2im,
    "Concat": _concat,
    "Div": _div,
    "Expand": _expand,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "TensorScatter": _tensor_scatter,
}
