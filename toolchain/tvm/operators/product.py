"""Matrix products of 16-bit floats, summed in float32 as ONNX Runtime does."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode

_NARROW = ("float16", "bfloat16")


def _matmul(node: OpNode) -> Any:
    from tvm import relax

    if node.dtype(0) not in _NARROW:
        return node.default()
    wide = [node.emit(relax.op.astype(node.input(i), "float32")) for i in range(2)]
    return relax.op.astype(node.emit(relax.op.matmul(*wide)), node.dtype(0))


CONVERTERS: dict[str, Converter] = {"MatMul": _matmul}
