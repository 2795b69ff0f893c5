"""The frame of a graph pass: one walk over a function's bindings, each value replaced by what a rule makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolchain.tvm.library import load_tvm


class Rule(Protocol):
    """Rewrites one function; made anew for each."""

    def value(self, graph: Graph, variable: Any, value: Any) -> Any:
        """What ``variable`` shall be bound to: ``value`` itself or something else; may emit bindings before it.

        ``value`` already speaks of the new function's variables.
        """


@dataclass(slots=True)
class Graph:
    """The function being built.

    Attributes:
        builder: the ``relax.BlockBuilder``.
        bound: new variable -> the value it is bound to.
        uses: old variable -> how many bindings and outputs of the old function read it.
    """

    builder: Any
    bound: dict[Any, Any] = field(default_factory=dict)
    uses: dict[Any, int] = field(default_factory=dict)

    def emit(self, value: Any) -> Any:
        """Binds ``value`` to a new variable, which is returned."""
        variable = self.builder.emit(value)
        self.bound[variable] = value
        return variable

    def definition(self, value: Any) -> Any:
        """The value behind a variable; parameters and anything else are given back as they are."""
        return self.bound.get(value, value)


def graph_pass(name: str, make: Callable[[], Rule]) -> Any:
    """A module pass that rewrites each Relax function by a rule of its own and drops dead code.

    Functions with control flow are left as they are: their bindings are not one straight line.
    """
    tvm = load_tvm()
    from tvm import relax

    @tvm.transform.module_pass(opt_level=0, name=f"toolchain.{name}")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        module = module.clone()
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function) and is_straight(function):
                module = _rewrite(module, variable, function, make())
        return relax.transform.DeadCodeElimination()(module)

    return apply


def is_straight(function: Any) -> bool:
    """Whether a function is one line of bindings, without control flow."""
    from tvm import relax

    blocks = getattr(function.body, "blocks", None)
    return blocks is not None and all(
        isinstance(binding, relax.VarBinding) and not isinstance(binding.value, (relax.If, relax.Function))
        for block in blocks
        for binding in block.bindings
    )


def _rewrite(module: Any, variable: Any, function: Any, rule: Rule) -> Any:
    from tvm import ir, relax

    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    builder = relax.BlockBuilder(module)
    graph = Graph(builder, uses=_uses(bindings, function.body.body))
    renamed: dict[Any, Any] = {}
    attributes = dict(function.attrs) if function.attrs is not None else {}
    with builder.function(variable.name_hint, list(function.params), attributes):
        with builder.dataflow():
            for binding in bindings:
                value = substitute(binding.value, renamed)
                new = rule.value(graph, binding.var, value)
                renamed[binding.var] = new if isinstance(new, (relax.Var, ir.GenericConst)) else graph.emit(new)
            output = builder.emit_output(substitute(function.body.body, renamed))
        rewritten = builder.emit_func_output(output)
    made = builder.get()
    known = {v.name_hint for v in module.get_global_vars()} | {rewritten.name_hint}
    module.update_func(variable, made[rewritten])
    for added, loop_nest in made.functions_items():
        if added.name_hint not in known:
            module.update_func(added, loop_nest)
    return module


def substitute(value: Any, renamed: dict[Any, Any]) -> Any:
    """``value`` with its variables replaced."""
    from tvm import relax

    if isinstance(value, relax.Var):
        return renamed.get(value, value)
    if isinstance(value, relax.Call):
        arguments = [substitute(argument, renamed) for argument in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(part, renamed) for part in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, renamed), value.index)
    return value


def _uses(bindings: list[Any], output: Any) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for value in (*(binding.value for binding in bindings), output):
        for variable in variables_of(value):
            counts[variable] = counts.get(variable, 0) + 1
    return counts


def variables_of(value: Any) -> list[Any]:
    """The variables that a binding's value reads, one entry for each time."""
    from tvm import relax

    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Call):
        parts = value.args
    elif isinstance(value, relax.Tuple):
        parts = value.fields
    else:
        parts = [value.tuple_value] if isinstance(value, relax.TupleGetItem) else []
    return [variable for part in parts for variable in variables_of(part)]
