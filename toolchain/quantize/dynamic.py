"""Dynamic int8: int8 weights, activations quantized while running, for MatMul, Gemm, Conv, LSTM, Attention, Gather."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ExitCode, ToolchainError
from toolchain.quantize.model import MODEL, byte_size, quiet
from toolchain.quantize.scheme import Scheme

if TYPE_CHECKING:
    import onnx

DYNAMIC_OPS = frozenset({"Attention", "Conv", "Gather", "Gemm", "LSTM", "MatMul"})
"""Operators with a dynamic int8 form; ONNX Runtime's quantizer writes Gemm as MatMul and Add first."""

_ONE_FILE = 1_900_000_000


def quantize_dynamic(model: onnx.ModelProto, scheme: Scheme) -> onnx.ModelProto:
    """A copy of a prepared model with dynamic int8; activations are u8 whatever the scheme says.

    Raises:
        ToolchainError: QUANTIZE when ONNX Runtime's quantizer fails, with its message.
    """
    import onnx
    from onnxruntime import quantization

    copy = type(model)()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as temporary, quiet():
        path = Path(temporary) / MODEL
        try:
            quantization.quantize_dynamic(
                copy,
                path,
                per_channel=scheme.per_channel,
                reduce_range=scheme.reduce_range,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=sorted(scheme.exclude),
                use_external_data_format=byte_size(model) > _ONE_FILE,
                extra_options={"WeightSymmetric": scheme.symmetric_weight},
            )
        except Exception as error:  # the quantizer raises bare ValueError, RuntimeError and AssertionError
            raise ToolchainError(
                f"ONNX Runtime's quantizer failed: {error or type(error).__name__}",
                where="quantize",
                hint="exclude the named node with quantize.exclude",
                code=ExitCode.QUANTIZE,
            ) from error
        return onnx.load(str(path))


def quantized_nodes(before: onnx.ModelProto, after: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes of ``before`` that became int8: gone by name and type, or reading int8 weights."""
    weights = {i.name: i.data_type for i in after.graph.initializer}
    left = {(n.op_type, n.name) for n in after.graph.node if weights.get(n.input[0] if n.input else "") not in (2, 3)}
    found = set()
    for node in before.graph.node:
        names = {(node.op_type, node.name)}
        if node.op_type == "Gemm":
            names.add(("MatMul", node.name + "_MatMul"))
        if node.op_type in DYNAMIC_OPS and not names & left:
            found.add(node.name)
    return frozenset(found)
