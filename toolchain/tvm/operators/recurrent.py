"""LSTM, GRU and RNN over a static number of steps, unrolled.

Equations: the ONNX operator specification.  The product of all steps' inputs with the input weights is one matrix
product; a step then has the product of the state with the recurrence weights and element-wise work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported, constant

MAX_STEPS = 1024
"""Most steps that are unrolled: the code and the time to compile it grow with each."""

_ALPHA = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "Elu": 1.0, "HardSigmoid": 0.2, "Affine": 1.0, "ScaledTanh": 1.0}
_BETA = {"HardSigmoid": 0.5, "Affine": 0.0, "ScaledTanh": 1.0}
_SIMPLE = ("Relu", "Tanh", "Sigmoid", "Softsign", "Softplus")

Function = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells the operators apart.

    ``states``: 1 (h) or 2 (h and c); ``activations``: defaults of one direction.
    """

    states: int
    activations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Direction:
    """One direction of one node, its operands as Relax expressions.

    ``projected``: per step (batch, gates * hidden), bias added; ``recurrence``: (hidden, gates * hidden);
    ``recurrence_bias``: (gates * hidden,) or None; ``peepholes``: (hidden,) each, or none.
    """

    node: OpNode
    projected: list[Any]
    recurrence: Any
    recurrence_bias: Any
    peepholes: tuple[Any, ...]
    functions: tuple[Function, ...]
    hidden: int
    lengths: Any
    reverse: bool

    def clip(self, value: Any) -> Any:
        from tvm import relax

        limit = self.node.attrs.get("clip")
        return value if limit is None else relax.op.clip(value, -float(limit), float(limit))


def _recurrent(node: OpNode, kind: _Kind) -> Any:
    """Inputs X (steps, batch, input) or, with layout 1, (batch, steps, input); outputs Y, Y_h and, LSTM, Y_c."""
    from tvm import relax

    layout = node.integer("layout", 0)
    x = node.input(0)
    if layout:
        x = node.emit(relax.op.permute_dims(x, [1, 0, 2]))
    steps, batch = _sizes(node, layout)
    if not 0 < steps <= MAX_STEPS:
        raise Unsupported(f"{steps} steps; from 1 to {MAX_STEPS} are unrolled. ONNX Runtime's engine takes any number")
    count = node.shape(1)[0]
    outputs: list[list[Any]] = [[] for _ in range(steps)]
    finals: list[list[Any]] = [[] for _ in range(kind.states)]
    for number in range(count):
        direction = _direction(node, kind, x, steps, number)
        state = [_initial(node, i, number, batch, direction.hidden) for i in range(kind.states)]
        sequence, state = _run(direction, state, steps, STEPS[node.operator])
        for step, value in enumerate(sequence):
            outputs[step].append(relax.op.expand_dims(value, 0))
        for i, value in enumerate(state):
            finals[i].append(relax.op.expand_dims(value, 0))
    rows = [relax.op.expand_dims(relax.op.concat(row, 0), 0) for row in outputs]
    y = node.emit(relax.op.concat(rows, 0))
    lasts = [node.emit(relax.op.concat(values, 0)) for values in finals]
    if layout:
        y = node.emit(relax.op.permute_dims(y, [2, 0, 1, 3]))
        lasts = [node.emit(relax.op.permute_dims(value, [1, 0, 2])) for value in lasts]
    return relax.Tuple([y, *lasts])


def _sizes(node: OpNode, layout: int) -> tuple[int, Any]:
    """Steps, and the batch, which may be an expression.

    Raises:
        Unsupported: the number of steps is dynamic; the model is not to blame.
    """
    shape: Any = getattr(node.input(0).ty, "shape", None)
    if not hasattr(shape, "values"):
        raise Unsupported("the shape of its input is only known at run time")
    first, second = [int(size) if hasattr(size, "value") else size for size in shape.values][:2]
    steps, batch = (second, first) if layout else (first, second)
    if not isinstance(steps, int):
        raise Unsupported(
            "the number of steps is dynamic, which this import into TVM does not support: it unrolls a fixed number "
            "of steps (buckets of the dimension give it one). ONNX Runtime's engine takes any length"
        )
    return steps, batch


def _direction(node: OpNode, kind: _Kind, x: Any, steps: int, number: int) -> _Direction:
    from tvm import relax

    hidden = node.shape(2)[2]
    weights = relax.op.permute_dims(_row(node, 1, number))
    projected = node.emit(relax.op.matmul(x, weights))
    bias = _row(node, 3, number) if node.has(3) else None
    recurrence_bias = None
    if bias is not None:
        halves = node.emit(relax.op.split(bias, 2, 0))
        first, recurrence_bias = node.emit(halves[0]), node.emit(halves[1])
        if not (node.operator == "GRU" and node.integer("linear_before_reset", 0)):
            first, recurrence_bias = relax.op.add(first, recurrence_bias), None
        projected = node.emit(relax.op.add(projected, first))
    parts = node.emit(relax.op.split(projected, steps, 0)) if steps > 1 else [projected]
    peepholes: tuple[Any, ...] = ()
    if node.operator == "LSTM" and node.has(7):
        thirds = node.emit(relax.op.split(_row(node, 7, number), 3, 0))
        peepholes = tuple(node.emit(thirds[i]) for i in range(3))
    return _Direction(
        node,
        [node.emit(relax.op.squeeze(node.emit(parts[i]) if steps > 1 else projected, [0])) for i in range(steps)],
        node.emit(relax.op.permute_dims(_row(node, 2, number))),
        recurrence_bias,
        peepholes,
        _functions(node, kind, number),
        hidden,
        node.input(4),
        node.text("direction", "forward") == "reverse" or number == 1,
    )


def _row(node: OpNode, index: int, number: int) -> Any:
    """Input ``index`` of direction ``number``, without the axis of directions."""
    from tvm import relax

    value = node.constant(index, f"input {index} of {node.operator}") if _is_constant(node, index) else None
    if value is not None:
        return constant(value[number])
    row = node.emit(relax.op.strided_slice(node.input(index), [0], [number], [number + 1]))
    return node.emit(relax.op.squeeze(row, [0]))


def _is_constant(node: OpNode, index: int) -> bool:
    from tvm import ir

    return isinstance(node.input(index), ir.GenericConst)


def _initial(node: OpNode, state: int, number: int, batch: Any, hidden: int) -> Any:
    """The first h (input 5) or c (input 6): (batch, hidden), zeros if left out."""
    from tvm import relax

    if not node.has(5 + state):
        return node.emit(relax.op.zeros(relax.ShapeExpr([batch, hidden]), node.dtype(0)))
    value, axis = node.input(5 + state), 1 if node.integer("layout", 0) else 0
    row = node.emit(relax.op.strided_slice(value, [axis], [number], [number + 1]))
    return node.emit(relax.op.squeeze(row, [axis]))


Step = Callable[[_Direction, Any, list[Any]], list[Any]]
"""From a direction, the projected inputs of a step and the states to the new states, h first."""


def _run(direction: _Direction, state: list[Any], steps: int, step: Step) -> tuple[list[Any], list[Any]]:
    """The outputs by step, and the last states; rows past their sequence's length keep their state and give zero."""
    from tvm import relax

    outputs: list[Any] = [None] * steps
    emit = direction.node.emit
    zero = relax.const(0.0, direction.node.dtype(0))
    for time in reversed(range(steps)) if direction.reverse else range(steps):
        new = [emit(value) for value in step(direction, direction.projected[time], state)]
        if direction.lengths is None:
            state, outputs[time] = new, new[0]
            continue
        # (batch,) lengths against this step, as a column.
        inside = emit(relax.op.expand_dims(relax.op.less(relax.const(time, "int32"), direction.lengths), 1))
        state = [emit(relax.op.where(inside, a, b)) for a, b in zip(new, state, strict=True)]
        outputs[time] = emit(relax.op.where(inside, new[0], zero))
    return outputs, state


def _gates(direction: _Direction, projected: Any, h: Any, count: int) -> list[Any]:
    from tvm import relax

    product = relax.op.matmul(h, direction.recurrence)
    if direction.recurrence_bias is not None:
        product = relax.op.add(product, direction.recurrence_bias)
    total = direction.node.emit(relax.op.add(projected, product))
    parts = direction.node.emit(relax.op.split(total, count, 1))
    return [direction.node.emit(parts[i]) for i in range(count)]


def _lstm_step(direction: _Direction, projected: Any, state: list[Any]) -> list[Any]:
    from tvm import relax

    op, clip = relax.op, direction.clip
    f, g, h_function = direction.functions
    h, c = state
    i, o, forget, new = _gates(direction, projected, h, 4)
    pi, po, pf = direction.peepholes or (None, None, None)
    if pi is not None:
        i, forget = op.add(i, op.multiply(pi, c)), op.add(forget, op.multiply(pf, c))
    i = direction.node.emit(f(clip(i)))
    coupled = direction.node.integer("input_forget", 0)
    forget = op.subtract(relax.const(1.0, direction.node.dtype(0)), i) if coupled else f(clip(forget))
    cell = direction.node.emit(op.add(op.multiply(forget, c), op.multiply(i, g(clip(new)))))
    if po is not None:
        o = op.add(o, op.multiply(po, cell))
    return [op.multiply(f(clip(o)), h_function(clip(cell))), cell]


def _gru_step(direction: _Direction, projected: Any, state: list[Any]) -> list[Any]:
    """With linear_before_reset, r * (h R + Rb); else (r * h) R."""
    from tvm import relax

    op, clip, emit, size = relax.op, direction.clip, direction.node.emit, direction.hidden
    f, g = direction.functions
    (h,) = state
    x_parts = emit(op.split(projected, [2 * size], 1))
    x_gates, x_new = emit(x_parts[0]), emit(x_parts[1])
    if direction.node.integer("linear_before_reset", 0):
        product = op.matmul(h, direction.recurrence)
        if direction.recurrence_bias is not None:
            product = op.add(product, direction.recurrence_bias)
        parts = emit(op.split(emit(product), [2 * size], 1))
        gates = emit(op.split(emit(f(clip(op.add(x_gates, emit(parts[0]))))), 2, 1))
        z, reset = emit(gates[0]), emit(gates[1])
        new = op.multiply(reset, emit(parts[1]))
    else:
        recurrence = emit(op.split(direction.recurrence, [2 * size], 1))
        product = op.matmul(h, emit(recurrence[0]))
        gates = emit(op.split(emit(f(clip(op.add(x_gates, product)))), 2, 1))
        z, reset = emit(gates[0]), emit(gates[1])
        new = op.matmul(op.multiply(reset, h), emit(recurrence[1]))
    new = emit(g(clip(op.add(x_new, new))))
    one = relax.const(1.0, direction.node.dtype(0))
    return [op.add(op.multiply(op.subtract(one, z), new), op.multiply(z, h))]


def _rnn_step(direction: _Direction, projected: Any, state: list[Any]) -> list[Any]:
    from tvm import relax

    total = relax.op.add(projected, relax.op.matmul(state[0], direction.recurrence))
    return [direction.functions[0](direction.clip(total))]


def _functions(node: OpNode, kind: _Kind, number: int) -> tuple[Function, ...]:
    """The activation functions of direction ``number``; alpha and beta are listed for those that have them."""
    names = node.texts("activations") or list(kind.activations) * (number + 1)
    alphas, betas = list(node.attrs.get("activation_alpha", ())), list(node.attrs.get("activation_beta", ()))
    functions: list[Function] = []
    known = {name.lower(): name for name in (*_SIMPLE, *_ALPHA)}
    for given in names:
        name = known.get(given.lower())
        if name is None:
            raise Unsupported(f"activation {given!r}")
        alpha = float(alphas.pop(0)) if name in _ALPHA and alphas else _ALPHA.get(name, 0.0)
        beta = float(betas.pop(0)) if name in _BETA and betas else _BETA.get(name, 0.0)
        functions.append(_activation(node, name, alpha, beta))
    size = len(kind.activations)
    return tuple(functions[number * size : (number + 1) * size])


def _activation(node: OpNode, name: str, alpha: float, beta: float) -> Function:
    from tvm import relax

    op = relax.op

    def number(value: float) -> Any:
        return relax.const(value, node.dtype(0))

    def affine(x: Any) -> Any:
        return op.add(op.multiply(x, number(alpha)), number(beta))

    def elu(x: Any) -> Any:
        negative = op.multiply(number(alpha), op.subtract(op.exp(x), number(1)))
        return op.where(op.less(x, number(0)), negative, x)

    table: dict[str, Function] = {
        "Relu": op.nn.relu,
        "Tanh": op.tanh,
        "Sigmoid": op.sigmoid,
        "Softsign": lambda x: op.divide(x, op.add(number(1), op.abs(x))),
        "Softplus": lambda x: op.log(op.add(number(1), op.exp(x))),
        "LeakyRelu": lambda x: op.where(op.less(x, number(0)), op.multiply(x, number(alpha)), x),
        "ThresholdedRelu": lambda x: op.where(op.greater(x, number(alpha)), x, number(0)),
        "Elu": elu,
        "HardSigmoid": lambda x: op.clip(affine(x), 0, 1),
        "Affine": affine,
        "ScaledTanh": lambda x: op.multiply(number(alpha), op.tanh(op.multiply(number(beta), x))),
    }
    return table[name]


STEPS: dict[str, Step] = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}

CONVERTERS: dict[str, Converter] = {
    "LSTM": lambda node: _recurrent(node, _Kind(2, ("Sigmoid", "Tanh", "Tanh"))),
    "GRU": lambda node: _recurrent(node, _Kind(1, ("Sigmoid", "Tanh"))),
    "RNN": lambda node: _recurrent(node, _Kind(1, ("Tanh",))),
}
