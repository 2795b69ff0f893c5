"""float16: onnxconverter-common's conversion, with the operators it breaks kept in float32."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.quantize.model import MODEL, find_problem, quiet, run_session, sort_topologically, unmark
from toolchain.quantize.weights import Held, in_pieces, session_of_held, write_held

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]

_ROUNDS = 8
_SMALLEST, _CLAMP = 1e-7, 1e4  # the converter's min_positive_val and max_finite_val
_LARGEST = 65504.0
_FLOAT16 = 10  # onnx.TensorProto.FLOAT16
_NAMED = re.compile(r"[Nn]ode\s*[:(]?\s*\(?['\"]?([^\s'\"()]+)|name:\s*([^\s'\"()]+)|op_type:\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Float16Result:
    """What the conversion came to.

    Attributes:
        problem: why there is no valid model, or "".
        kept_ops: operator types kept in float32 because the model was invalid with them converted.
        kept_nodes: nodes kept in float32 by name: the excluded ones, and those around values too large.
        clamped: messages about constants moved into float16's range.
        halved: how many initializers became float16.
    """

    problem: str
    kept_ops: tuple[str, ...]
    kept_nodes: tuple[str, ...]
    clamped: tuple[str, ...]
    halved: int


def convert_float16(
    held: Held, folder: Path, feed: dict[str, Any], exclude: Collection[str] = ()
) -> Float16Result:  # fmt: skip
    """Write a float16 model with float32 inputs and outputs into ``folder``.

    The converter writes invalid models for some operators (a Cast to float32 keeps saying float32 while its
    readers expect float16).  The message of the checker or of ONNX Runtime names the node; its operator type is
    kept in float32 and the conversion starts over, up to 8 times.

    Nodes that write or read a value beyond float16's range on ``feed`` stay in float32 too: ONNX Runtime's CPU
    provider computes float16 in float32 and would hide the overflow that a GPU shows.

    The converter sees the graph without its large weights; these are converted as it does it, piece by piece.

    Args:
        held: the model; not changed.
        folder: where model.onnx goes; left without one when there is a problem.
        feed: inputs to run the result on; NaN where the float32 model has a number is a problem.
        exclude: nodes that stay float32.
    """
    kept: list[str] = []
    clamped: tuple[str, ...] = ()
    model, problem = held.model, ""
    reference, overflowing = _probe(held, feed)
    nodes = tuple(sorted({*exclude, *overflowing}))
    for _ in range(_ROUNDS):
        copy = type(model)()
        copy.CopyFrom(model)
        # Blocked by node, not by type: with the type Cast blocked, the converter blocks the casts that it inserts
        # itself, and inserts casts around those without end.
        blocked = [*nodes, *(node.name for node in model.graph.node if node.op_type in kept)]
        try:
            converted, clamped = _convert(copy, blocked)
        except Exception as error:  # the converter raises bare ValueError, KeyError and IndexError
            problem = f"the converter failed: {type(error).__name__}: {error}"
            break
        halves = {t.name for t in converted.graph.initializer if t.data_type == _FLOAT16}
        halves -= {t.name for t in model.graph.initializer if t.data_type == _FLOAT16}
        path = _write(converted, held, halves, folder)
        problem = find_problem(path, feed, reference)
        if not problem:
            large = (m for name in sorted(halves & held.weights.keys()) for m in truncations(held.weights[name]))
            return Float16Result("", tuple(kept), nodes, tuple(dict.fromkeys([*clamped, *large])), len(halves))
        offender = _offending_op(problem, converted, model, kept)
        for file in folder.glob(f"{MODEL}*"):
            file.unlink()
        if offender is None:
            break
        kept.append(offender)
    return Float16Result(problem, tuple(kept), nodes, clamped, 0)


def _convert(model: onnx.ModelProto, blocked: list[str]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    from onnxconverter_common import float16

    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always")
        converted = float16.convert_float_to_float16(
            model,
            min_positive_val=_SMALLEST,
            max_finite_val=_CLAMP,
            keep_io_types=True,
            node_block_list=blocked,
        )
    messages = dict.fromkeys(str(w.message) for w in caught if "truncated" in str(w.message))
    sort_topologically(converted.graph)
    return converted, tuple(messages)


def _write(converted: onnx.ModelProto, held: Held, halves: Collection[str], folder: Path) -> Path:
    """The converted graph with its large weights, those of ``halves`` as float16; where the source has them."""

    def pieces(name: str) -> Iterator[Array]:
        found = in_pieces(held.weights[name])
        return map(to_float16, found) if name in halves else found

    unmark(converted)
    named = {name: partial(pieces, name) for name in held.weights}
    return write_held(converted, named, folder, held.beside)


def to_float16(values: Array) -> Array:
    """float32 values as float16, moved into its range as onnxconverter-common does: 0, NaN and infinities stay."""
    import numpy as np

    size = np.abs(values)
    small, large = (size < _SMALLEST) & (size > 0), (size > _CLAMP) & np.isfinite(size)
    if small.any() or large.any():
        values = values.copy()
        values[small] = np.copysign(np.float32(_SMALLEST), values[small])
        values[large] = np.copysign(np.float32(_CLAMP), values[large])
    return values.astype(np.float16)


def truncations(values: Array) -> list[str]:
    """What the converter says of values that :func:`to_float16` moves."""
    import numpy as np

    ends: dict[tuple[int, bool], Any] = {}
    for piece in in_pieces(values):
        size = np.abs(piece)
        moved = piece[(size <= _SMALLEST) & (size > 0) | (size >= _CLAMP)]
        for sign in (1, -1) if moved.size else ():
            own = sign * moved[sign * moved > 0]
            large, small = own[own >= _CLAMP], own[own <= _SMALLEST]
            if large.size:
                ends[sign, True] = max(ends.get((sign, True), 0), large.max())
            if small.size:
                ends[sign, False] = min(ends.get((sign, False), np.inf), small.min())
    limits = {(sign, large): sign * (_CLAMP if large else _SMALLEST) for sign in (1, -1) for large in (True, False)}
    told = ((np.float32(key[0] * ends[key]), limit) for key, limit in limits.items() if key in ends)
    return [f"the float32 number {got} will be truncated to {limit}" for got, limit in told]


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


def _probe(held: Held, feed: dict[str, Any]) -> tuple[dict[str, Array], set[str]]:
    """The model's outputs on ``feed``, and its nodes around values beyond float16's range.

    Constants are clamped as the converter clamps them.
    """
    import numpy as np
    from onnx import TensorProto, numpy_helper

    copy = type(held.model)()
    copy.CopyFrom(held.model)
    clamped = False
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in held.weights:
            array = numpy_helper.to_array(tensor)
            if array.size and np.abs(array).max() > _CLAMP:
                tensor.CopyFrom(numpy_helper.from_array(np.clip(array, -_CLAMP, _CLAMP), tensor.name))
                clamped = True
    large = {n for n, w in held.weights.items() if max(np.abs(p).max() for p in in_pieces(w)) > _CLAMP}
    weights = {n: np.clip(w, -_CLAMP, _CLAMP) if n in large else w for n, w in held.weights.items()}
    values = _all_floats(copy, weights, feed)
    beyond = {n for n, v in values.items() if v.dtype == np.float32 and v.size and np.nanmax(np.abs(v)) > _LARGEST}
    nodes = {node.name for node in held.model.graph.node if beyond & {*node.input, *node.output}}
    names = [output.name for output in held.model.graph.output]
    if clamped or large:
        with session_of_held(held.model, held.weights) as session:
            values = run_session(session, feed)
    return {name: values[name] for name in names}, nodes


def _all_floats(model: onnx.ModelProto, weights: Mapping[str, Array], feed: dict[str, Any]) -> dict[str, Array]:
    """The outputs and all float32 values between; ``model`` is changed."""
    from onnx import TensorProto, helper

    present = {o.name for o in model.graph.output}
    made = {o for node in model.graph.node for o in node.output}
    floats = [v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    extra = [name for name in floats if name in made and name not in present]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    with session_of_held(model, weights) as session:
        return run_session(session, feed)
