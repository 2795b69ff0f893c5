"""Static int8 in the QDQ form: QuantizeLinear and DequantizeLinear around the operators that run in int8."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.quantize.calibration import Calibration
from toolchain.quantize.model import captured, quiet, sort_topologically
from toolchain.quantize.scheme import INT8_OPS, WEIGHTED_OPS, Scheme

if TYPE_CHECKING:
    import onnx

_FLOAT = 1  # onnx.TensorProto.FLOAT


def check_excluded(model: onnx.ModelProto, scheme: Scheme) -> None:
    """Refuse names in ``exclude`` that the model does not have.

    Raises:
        ToolchainError: QUANTIZE, one detail per unknown name.
    """
    names = [node.name for node in model.graph.node]
    unknown = [name for name in scheme.exclude if name not in names]
    if unknown:
        raise ToolchainError(
            f"{len(unknown)} names are no nodes of the optimized model",
            where="quantize.exclude",
            details=[f"{name!r}{did_you_mean(name, names)}" for name in unknown],
            hint="the report of an earlier build lists the nodes by name",
            code=ExitCode.QUANTIZE,
        )


def blockers(model: onnx.ModelProto, calibration: Calibration) -> dict[str, str]:
    """Nodes of int8 operators that can't be quantized, by name, with the reason."""
    types = value_types(model)
    constants = {i.name for i in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in INT8_OPS or node.domain not in ("", "ai.onnx"):
            continue
        values = [name for name in (*node.input, *node.output) if name]
        floats = [name for name in values if types.get(name) == _FLOAT]
        unknown = [name for name in floats if name not in constants and name not in calibration.ranges]
        if not node.input or types.get(node.input[0]) != _FLOAT:
            found[node.name] = "its input is not float32"
        elif reasons := [calibration.unusable[name] for name in values if name in calibration.unusable]:
            found[node.name] = reasons[0]
        elif node.op_type == "Conv" and node.input[1] not in constants:
            found[node.name] = "its weights are not constant"
        elif unknown:
            found[node.name] = f"no value range is known for {unknown[0]!r}"
    return found


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every value whose type is known."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: int(v.type.tensor_type.elem_type) for v in values}
    return types | {i.name: int(i.data_type) for i in graph.initializer}


def quantize_static(
    model: onnx.ModelProto,
    calibration: Calibration,
    scheme: Scheme,
    *,
    keep_float: Collection[str] = (),
    only: Collection[str] | None = None,
) -> onnx.ModelProto:
    """A quantized copy of a prepared model.

    A quantizer pair right before a graph output that a MatMul or Gemm makes is taken out again: their kernels
    write float, and 256 levels would make ties among scores.

    Args:
        model: as calibrated; not changed.
        calibration: its ranges; one calibration serves any number of calls.
        scheme: types and granularity; its ``exclude`` stays float.
        keep_float: further nodes that stay float.
        only: quantize no nodes but these.

    Raises:
        ToolchainError: QUANTIZE when ONNX Runtime's quantizer fails, with its message.
    """
    from onnxruntime.quantization import QuantType

    from toolchain.quantize.channels import ChannelQuantizer

    copy = type(model)()
    copy.CopyFrom(model)
    if only is not None and not only:
        return copy
    with quiet():
        try:
            quantizer = ChannelQuantizer(
                copy,
                scheme.per_channel,
                scheme.reduce_range,
                QuantType.QInt8,
                {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}[scheme.activation],
                calibration.ranges,
                sorted(only or ()),
                sorted({*scheme.exclude, *keep_float, *blockers(model, calibration)}),
                sorted(INT8_OPS),
                {"ActivationSymmetric": scheme.symmetric_activation, "WeightSymmetric": scheme.symmetric_weight},
            )
            quantizer.quantize_model()
        except Exception as error:  # the quantizer raises bare ValueError, RuntimeError and AssertionError
            raise ToolchainError(
                f"ONNX Runtime's quantizer failed: {error or type(error).__name__}",
                where="quantize",
                hint="exclude the named node or tensor's node with quantize.exclude",
                code=ExitCode.QUANTIZE,
            ) from error
    result: onnx.ModelProto = quantizer.model.model
    _float_outputs(result.graph)
    sort_topologically(result.graph)
    return result


def _float_outputs(graph: onnx.GraphProto) -> None:
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for value in graph.output:
        dequantize = producers.get(value.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or readers.get(value.name):
            continue
        quantize = producers.get(dequantize.input[0])
        source = producers.get(quantize.input[0]) if quantize is not None else None
        if quantize is None or source is None or source.op_type not in WEIGHTED_OPS - {"Conv"}:
            continue
        if len(readers[quantize.input[0]]) > 1 or len(readers[dequantize.input[0]]) > 1:
            continue
        source.output[0] = value.name
        graph.node.remove(quantize)
        graph.node.remove(dequantize)
    _drop_unused_initializers(graph)


def _drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in (*node.input, *captured(node))}
    unused = [i for i in graph.initializer if i.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)
