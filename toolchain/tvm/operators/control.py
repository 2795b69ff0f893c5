"""If with a known condition, Loop with known trips, and Scan over a static axis: unrolled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant, constant_value

MAX_TRIPS = 1024
"""Most rounds that are unrolled: the code and the time to compile it grow with each."""


def _if(node: OpNode) -> Any:
    from tvm import relax

    condition = constant_value(node.input(0))
    if condition is None:
        return node.default()
    branch = node.attrs["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"]
    return relax.Tuple(node.inline(branch, []))


def _loop(node: OpNode) -> Any:
    """Body: (round, condition, states...) -> (condition, states..., values to stack...)."""
    import numpy as np
    from tvm import relax

    trips, condition = node.constant(0, "the trip count"), node.constant(1, "the first condition")
    limit = MAX_TRIPS + 1 if trips is None else int(trips.reshape(-1)[0])
    going = True if condition is None else bool(condition.reshape(-1)[0])
    body, states = node.attrs["body"], list(node.inputs[2:])
    stacked: list[list[Any]] = [[] for _ in range(node.outputs - len(states))]
    done = 0
    while going and done < limit:
        if done == MAX_TRIPS:
            raise Unsupported(f"more than {MAX_TRIPS} rounds")
        results = node.inline(body, [constant(np.int64(done)), constant(np.bool_(True)), *states])
        again = constant_value(results[0])
        if again is None:
            raise Unsupported("whether the loop goes on is only known at run time")
        going, done = bool(again.reshape(-1)[0]), done + 1
        states = results[1 : 1 + len(states)]
        for values, value in zip(stacked, results[1 + len(states) :], strict=True):
            values.append(value)
    return relax.Tuple([*states, *(_stack(node, values, 0) for values in stacked)])


def _scan(node: OpNode) -> Any:
    """Body: (states..., one slice of each scanned input...) -> (states..., one slice of each output...)."""
    from tvm import relax

    if node.opset < 9:
        raise Unsupported("Scan with a batch axis (before operator set 9)")
    body, scanned_count = node.attrs["body"], int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - scanned_count
    states, scanned = list(node.inputs[:count]), node.inputs[count:]
    axes = [a % node.rank(count + i) for i, a in enumerate(_ints(node, "scan_input_axes", scanned_count))]
    steps = node.shape(count)[axes[0]]
    if not 0 < steps <= MAX_TRIPS:
        raise Unsupported(f"{steps} steps; from 1 to {MAX_TRIPS} are unrolled")
    slices = [_slices(node, value, axis, steps) for value, axis in zip(scanned, axes, strict=True)]
    backwards = _ints(node, "scan_input_directions", scanned_count)
    slices = [part[::-1] if back else part for part, back in zip(slices, backwards, strict=True)]
    stacked: list[list[Any]] = [[] for _ in range(node.outputs - count)]
    for step in range(steps):
        results = node.inline(body, [*states, *(part[step] for part in slices)])
        states = results[:count]
        for values, value in zip(stacked, results[count:], strict=True):
            values.append(value)
    directions, out_axes = (_ints(node, f"scan_output_{k}", len(stacked)) for k in ("directions", "axes"))
    outputs = [
        _stack(node, values[::-1] if back else values, axis)
        for values, back, axis in zip(stacked, directions, out_axes, strict=True)
    ]
    return relax.Tuple([*states, *outputs])


def _ints(node: OpNode, name: str, count: int) -> list[int]:
    return [int(v) for v in node.attrs.get(name, [0] * count)]


def _slices(node: OpNode, value: Any, axis: int, steps: int) -> list[Any]:
    from tvm import relax

    if steps == 1:
        return [node.emit(relax.op.squeeze(value, [axis]))]
    parts = node.emit(relax.op.split(value, steps, axis))
    return [node.emit(relax.op.squeeze(node.emit(parts[i]), [axis])) for i in range(steps)]


def _stack(node: OpNode, values: Sequence[Any], axis: int) -> Any:
    from tvm import relax

    if not values:
        raise Unsupported("a loop of no rounds has outputs of unknown shape")
    rank = int(values[0].ty.ndim)
    axis = axis + rank + 1 if axis < 0 else axis
    return node.emit(relax.op.concat([node.emit(relax.op.expand_dims(value, axis)) for value in values], axis))


CONVERTERS: dict[str, Converter] = {"If": _if, "Loop": _loop, "Scan": _scan}
