"""Normalizations with the outputs and axes that TVM's importer leaves out."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.elementwise import number
from toolchain.tvm.operators.node import Converter, OpNode


def _layer_normalization(node: OpNode) -> Any:
    """Outputs y, the mean and the inverse standard deviation, these two in float32 (or float64 as the input)."""
    from tvm import relax

    op, x, rank = relax.op, node.input(0), node.rank(0)
    axes = list(range(node.axis("axis", -1, rank), rank))
    y = node.default()
    y = y[0] if isinstance(y, relax.Tuple) else y
    if node.outputs == 1:
        return y
    wide = node.dtype(0) if node.dtype(0) == "float64" else "float32"
    value = node.emit(op.astype(x, wide)) if node.dtype(0) != wide else x
    mean = node.emit(op.mean(value, axes, True))
    difference = node.emit(op.subtract(value, mean))
    variance = op.mean(op.multiply(difference, difference), axes, True)
    epsilon = relax.const(float(node.attrs.get("epsilon", 1e-5)), wide)
    inverse = node.emit(op.divide(relax.const(1.0, wide), op.sqrt(op.add(variance, epsilon))))
    return relax.Tuple([node.emit(y), mean, inverse])


def _instance_normalization(node: OpNode) -> Any:
    """Each channel of each image normalized on its own: a layer normalization over the axes of the image."""
    from tvm import relax

    op, x, rank = relax.op, node.input(0), node.rank(0)
    image = relax.ShapeExpr(list(x.ty.shape.values)[2:]) if rank > 2 and x.ty.shape is not None else None
    if image is None or node.dtype(0) not in ("float32", "float16"):
        return node.default()
    unused = node.emit(op.zeros(image, node.dtype(0)))
    axes, epsilon = list(range(2, rank)), float(node.attrs.get("epsilon", 1e-5))
    normal = node.emit(op.nn.layer_norm(x, unused, unused, axes, epsilon, center=False, scale=False))
    wide = relax.ShapeExpr([node.input(1).ty.shape.values[0], *[1] * (rank - 2)])
    scale, bias = (node.emit(op.reshape(node.input(index), wide)) for index in (1, 2))
    return op.add(node.emit(op.multiply(normal, scale)), bias)


def _lp_normalization(node: OpNode) -> Any:
    """X over its norm along one axis; 0 where the norm is 0."""
    from tvm import relax

    op, x = relax.op, node.input(0)
    axis = [node.axis("axis", -1, node.rank(0))]
    if node.integer("p", 2) == 1:
        norm = op.sum(op.abs(x), axis, True)
    else:
        norm = op.sqrt(op.sum(op.multiply(x, x), axis, True))
    norm = node.emit(norm)
    is_zero = op.equal(norm, number(node, 0))
    return op.where(is_zero, number(node, 0), op.divide(x, op.where(is_zero, number(node, 1), norm)))


def _rms_normalization(node: OpNode) -> Any:
    """X / sqrt(mean(x^2) + epsilon) * scale over the axes from ``axis`` on; the mean in stash_type."""
    from tvm import relax

    op, x, rank, dtype = relax.op, node.input(0), node.rank(0), node.dtype(0)
    axis = node.axis("axis", -1, rank)
    if axis == rank - 1:
        return node.default()
    wide = dtype if dtype == "float64" else "float32"
    value = node.emit(op.astype(x, wide)) if dtype != wide else x
    mean = op.mean(op.multiply(value, value), list(range(axis, rank)), True)
    epsilon = relax.const(float(node.attrs.get("epsilon", 1e-5)), wide)
    scaled = op.divide(value, op.sqrt(op.add(mean, epsilon)))
    return op.multiply(op.astype(scaled, dtype) if dtype != wide else scaled, node.input(1))


CONVERTERS: dict[str, Converter] = {
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "RMSNormalization": _rms_normalization,
}
