"""Matrix products and softmax of 16-bit floats, summed in float32 as ONNX Runtime does; operands stay narrow."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode

_NARROW = ("float16", "bfloat16")


def _matmul(node: OpNode) -> Any:
    from tvm import relax

    if node.dtype(0) not in _NARROW:
        return node.default()
    product = relax.op.matmul(node.input(0), node.input(1), out_dtype="float32")
    return relax.op.astype(node.emit(product), node.dtype(0))


def _softmax(node: OpNode) -> Any:
    from tvm import relax

    if node.dtype(0) not in _NARROW or node.opset < 13:
        return node.default()
    wide = node.emit(relax.op.astype(node.input(0), "float32"))
    return relax.op.astype(node.emit(relax.op.nn.softmax(wide, node.integer("axis", -1))), node.dtype(0))


CONVERTERS: dict[str, Converter] = {"MatMul": _matmul, "Softmax": _softmax}
