"""Loop nests that differ in numbers alone become one, and are given the numbers.

Each layer of a quantized model has its own scales and zero points.  Written into its fused loop nest they make every
layer's a nest of its own, to be scheduled, compiled and kept in the library apart.  Here the constants of each loop
nest are taken out; of those that are then the same, one stays, which reads what differs between them from a small
tensor.  What they agree in stays a constant of the code: a zero point of 0, a bound, a polynomial's coefficients.

A bound (an operand of ``max`` or ``min``) is never taken out: constants come first there, so that NaN stays NaN
(:mod:`toolchain.tvm.nan_order`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass, is_straight
from toolchain.tvm.graph.values import operator_of
from toolchain.tvm.library import load_tvm

_DTYPE = "float32"


def share_loop_nests() -> Any:
    """The pass, over fused loop nests before they are scheduled."""
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="toolchain.share_loop_nests")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        shared = _shared(module)
        return graph_pass("use_shared", lambda: _Use(shared))(module) if shared else module

    return apply


@dataclass(frozen=True, slots=True)
class _Open:
    """A loop nest with variables in place of constants.

    Attributes:
        function: its parameters end with the variables.
        variables: one for each constant, in order.
        values: the constants.
    """

    function: Any
    variables: list[Any]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Shared:
    """What takes the place of a loop nest: ``function`` is given ``numbers`` behind its other operands."""

    function: Any
    name: str
    numbers: tuple[float, ...]


class _Use:
    def __init__(self, shared: dict[str, _Shared]) -> None:
        self._shared = shared

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        import numpy as np
        from tvm import relax

        found = self._shared.get(value.args[0].name_hint) if operator_of(value) == "relax.call_tir" else None
        if found is None:
            return value
        numbers = [relax.const(np.array(found.numbers, _DTYPE), _DTYPE)] if found.numbers else []
        operands = relax.Tuple([*value.args[1].fields, *numbers])
        name = graph.builder.add_func(found.function, found.name)
        return relax.Call(value.op, [name, operands, *value.args[2:]], value.attrs, value.ty_args)


def _shared(module: Any) -> dict[str, _Shared]:
    """Name of a loop nest -> what takes its place, for those that are alike."""
    import tvm_ffi

    groups: dict[int, list[list[tuple[str, _Open, int]]]] = {}
    for name, function, operands in _loop_nests(module):
        made = _opened(function)
        alike = groups.setdefault(tvm_ffi.structural_hash(made.function), [])
        for group in alike:
            if tvm_ffi.structural_equal(group[0][1].function, made.function):
                group.append((name, made, operands))
                break
        else:
            alike.append([(name, made, operands)])
    shared: dict[str, _Shared] = {}
    for group in (group for alike in groups.values() for group in alike if len(group) > 1):
        (first, made, operands), columns = group[0], list(zip(*(made.values for _, made, _ in group), strict=True))
        slots = {column: i for i, column in enumerate(dict.fromkeys(c for c in columns if len(set(c)) > 1))}
        function = _closed(made, columns, slots, operands)
        for i, (name, _, _) in enumerate(group):
            shared[name] = _Shared(function, first, tuple(column[i] for column in slots))
    return shared


def _loop_nests(module: Any) -> Iterator[tuple[str, Any, int]]:
    """Name, function and number of operands of each loop nest that only straight functions call, in order of calls."""
    from tvm import relax

    functions = [f for _, f in module.functions_items() if isinstance(f, relax.Function)]
    barred = {v.name_hint for f in functions if not is_straight(f) for v in relax.analysis.all_global_vars(f)}
    seen: set[str] = set()
    for function in (f for f in functions if is_straight(f)):
        for binding in (binding for block in function.body.blocks for binding in block.bindings):
            call = binding.value
            if operator_of(call) != "relax.call_tir":
                continue
            name = call.args[0].name_hint
            if name not in seen | barred:
                seen.add(name)
                yield name, module[call.args[0]], len(call.args[1].fields)


def _opened(function: Any) -> _Open:
    import tvm_ffi
    from tvm import tirx

    variables: list[Any] = []
    constants: dict[Any, Any] = {}

    def taken(constant: Any) -> Any:
        if str(constant.ty.dtype) != _DTYPE:
            return constant
        variables.append(tirx.Var(f"number_{len(variables)}", _DTYPE))
        constants[variables[-1]] = constant
        return variables[-1]

    def bound(value: Any) -> Any:
        kept = [constants.get(part, part) if isinstance(part, tirx.Var) else part for part in (value.a, value.b)]
        return value if kept[0] is value.a and kept[1] is value.b else type(value)(*kept)

    body = tvm_ffi.structural_map(function.body, [(tirx.FloatImm, taken), ((tirx.Max, tirx.Min), bound)])
    used = set(tirx.analysis.undefined_vars(body, list(function.params)))
    left = [variable for variable in variables if variable in used]
    opened = tirx.PrimFunc([*function.params, *left], body, function.ret_type, function.attrs)
    return _Open(opened, left, tuple(float(constants[variable].value) for variable in left))


def _closed(made: _Open, columns: list[tuple[float, ...]], slots: dict[tuple[float, ...], int], operands: int) -> Any:
    """The loop nest with what all agree in as constants, and the rest read from a tensor behind its operands."""
    import tvm_ffi
    from tvm import ir, s_tir, tirx

    numbers = tirx.decl_buffer([tirx.const(len(slots), "int64")], _DTYPE, "numbers")
    column_of = dict(zip(made.variables, columns, strict=True))
    pending: list[int] = []

    def put(variable: Any) -> Any:
        column = column_of.get(variable)
        if column is None:
            return variable
        if column not in slots:
            return tirx.FloatImm(_DTYPE, column[0])
        pending.append(slots[column])
        return tirx.BufferLoad(numbers, [tirx.const(slots[column], "int64")])

    def noted(block: Any) -> Any:
        """``block``, in whose body the last numbers were put, with the reads of them."""
        places = [
            ir.Range.from_min_extent(tirx.const(i, "int64"), tirx.const(1, "int64")) for i in sorted(set(pending))
        ]
        pending.clear()
        if not places:
            return block
        reads = [*block.reads, *(tirx.BufferRegion(numbers, [place]) for place in places)]
        return s_tir.SBlock(
            block.iter_vars, reads, block.writes, block.name_hint, block.body, block.init,
            block.alloc_buffers, block.match_buffers, block.annotations,
        )  # fmt: skip

    function = made.function
    body = tvm_ffi.structural_map(function.body, [(ir.Var, put), (s_tir.SBlock, noted)])
    parameters = list(function.params)[: len(function.params) - len(made.variables)]
    if slots:
        parameters.insert(operands, numbers)
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
