"""float16: onnxconverter-common's conversion, with the operators it breaks kept in float32."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.quantize.model import (
    byte_limit_exceeded,
    byte_size,
    find_problem,
    quiet,
    run_session,
    session_of,
    sort_topologically,
    write_model,
)

if TYPE_CHECKING:
    import onnx

_ROUNDS = 8
_CLAMP = 1e4  # the converter's max_finite_val
_LARGEST = 65504.0
_NAMED = re.compile(r"[Nn]ode\s*[:(]?\s*\(?['\"]?([^\s'\"()]+)|name:\s*([^\s'\"()]+)|op_type:\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Float16Result:
    """What the conversion came to.

    Attributes:
        problem: why there is no valid model, or "".
        kept_ops: operator types kept in float32 because the model was invalid with them converted.
        kept_nodes: nodes kept in float32 by name: the excluded ones, and those around values too large.
        clamped: messages about constants moved into float16's range.
        bytes_before, bytes_after: bytes of the weights.
    """

    problem: str
    kept_ops: tuple[str, ...]
    kept_nodes: tuple[str, ...]
    clamped: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def convert_float16(
    model: onnx.ModelProto,
    folder: Path,
    feed: dict[str, Any],
    reference: dict[str, Any],
    exclude: Collection[str] = (),
) -> Float16Result:
    """Write a float16 model with float32 inputs and outputs into ``folder``.

    The converter writes invalid models for some operators (a Cast to float32 keeps saying float32 while its
    readers expect float16).  The message of the checker or of ONNX Runtime names the node; its operator type is
    kept in float32 and the conversion starts over, up to 8 times.

    Nodes that write or read a value beyond float16's range on ``feed`` stay in float32 too: ONNX Runtime's CPU
    provider computes float16 in float32 and would hide the overflow that a GPU shows.

    Args:
        model: prepared; not changed.
        folder: where model.onnx goes; left without one when there is a problem.
        feed: inputs to run the result on.
        reference: the float32 model's outputs on ``feed``.
        exclude: nodes that stay float32.
    """
    kept: list[str] = []
    clamped: tuple[str, ...] = ()
    problem, size = "", byte_size(model)
    nodes = tuple(sorted({*exclude, *_overflowing(model, feed)}))
    for _ in range(_ROUNDS):
        copy = type(model)()
        copy.CopyFrom(model)
        # Blocked by node, not by type: with the type Cast blocked, the converter blocks the casts that it inserts
        # itself, and inserts casts around those without end.
        blocked = [*nodes, *(node.name for node in model.graph.node if node.op_type in kept)]
        try:
            converted, clamped = _convert(copy, blocked, infer=not byte_limit_exceeded(copy))
        except Exception as error:  # the converter raises bare ValueError, KeyError and IndexError
            problem = f"the converter failed: {type(error).__name__}: {error}"
            break
        path = write_model(converted, folder)
        problem = find_problem(path, feed, reference)
        if not problem:
            return Float16Result("", tuple(kept), nodes, clamped, size, byte_size(converted))
        offender = _offending_op(problem, converted, model, kept)
        path.unlink()
        if offender is None:
            break
        kept.append(offender)
    return Float16Result(problem, tuple(kept), nodes, clamped, size, size)


def _convert(model: onnx.ModelProto, blocked: list[str], infer: bool = True) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """``infer``: let the converter infer types once more; it does so with all weights in one protobuf message."""
    from onnxconverter_common import float16

    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always")
        converted = float16.convert_float_to_float16(
            model, keep_io_types=True, disable_shape_infer=not infer, node_block_list=blocked
        )
    messages = dict.fromkeys(str(w.message) for w in caught if "truncated" in str(w.message))
    sort_topologically(converted.graph)
    return converted, tuple(messages)


def _offending_op(problem: str, converted: onnx.ModelProto, model: onnx.ModelProto, kept: list[str]) -> str | None:
    """The operator type to keep in float32 next: of the named node, or of the ones around a named cast."""
    ops: dict[str, str] = {node.name: node.op_type for node in model.graph.node}
    inserted = {node.name: node for node in converted.graph.node if node.name not in ops}
    for match in _NAMED.finditer(problem):
        name = next(group for group in match.groups() if group)
        found = [ops.get(name, "")]
        if name in inserted:
            around = {*inserted[name].input, *inserted[name].output}
            found += [ops.get(n.name, "") for n in converted.graph.node if around & {*n.input, *n.output}]
        if name in ops.values():
            found.append(name)
        for op in found:
            if op and op not in kept:
                return op
    return None


def _overflowing(model: onnx.ModelProto, feed: dict[str, Any]) -> set[str]:
    """Nodes around values beyond float16's range, with constants clamped as the converter clamps them."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    copy = type(model)()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if array.size and np.abs(array).max() > _CLAMP:
                tensor.CopyFrom(numpy_helper.from_array(np.clip(array, -_CLAMP, _CLAMP), tensor.name))
    present = {o.name for o in copy.graph.output}
    made = {o for node in copy.graph.node for o in node.output}
    floats = [v.name for v in copy.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    extra = [name for name in floats if name in made and name not in present]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    with session_of(copy) as session:
        values = run_session(session, feed)
    large = {n for n, v in values.items() if v.dtype == np.float32 and v.size and np.nanmax(np.abs(v)) > _LARGEST}
    return {node.name for node in model.graph.node if large & {*node.input, *node.output}}
