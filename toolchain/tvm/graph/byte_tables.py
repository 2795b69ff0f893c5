"""Element-wise work from one 8-bit value to another becomes a table of its 256 values.

Between two quantized tensors there may be a whole activation: dequantize, erf, multiply, quantize and dequantize in
between.  It is a function of one byte.  The table is computed with the operators' own float32 arithmetic, so it gives
what the chain gives; transcendental functions are computed in float64 and rounded, which is closer to their
definition than a polynomial.

A chain stays as it is where reading the table would cost more than computing it: on which target a lookup takes how
long, :meth:`toolchain.tvm.machine.Machine.lookup_cost` knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.values import constant_of, dtype_of, operator_of, same_shape, shape_of
from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import Machine

if TYPE_CHECKING:
    import numpy as np

_LOOKUP = "toolchain.lookup"
"""Attribute of a loop nest that reads a table."""

_ELEMENTWISE = 0
"""TVM's ``kElemWise``."""

_FUNCTION = 24
"""What a polynomial costs, in instructions."""
_DIVISION = 6
_BYTES = ("int8", "uint8")

_Form = Callable[..., "np.ndarray"]


def byte_tables(machine: Machine) -> Any:
    """The pass, over element-wise operators in any layout."""
    return graph_pass("byte_tables", lambda: _Tables(machine))


def fuse_tables() -> Any:
    """A pass after TVM's own search for patterns, to which a place that is a value is opaque: lookups can be fused."""
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="toolchain.fuse_tables")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        module = module.clone()
        for variable, function in module.functions_items():
            if function.attrs is not None and _LOOKUP in function.attrs:
                module.update_func(variable, function.with_attr("op_pattern", _ELEMENTWISE))
        return module

    return apply


@dataclass(frozen=True, slots=True)
class _Table:
    """A value that depends on one byte of ``source``.

    Attributes:
        source: the 8-bit tensor.
        values: 256 values in the order of the byte's bits.
        cost: instructions of the chain from the source, for one vector.
    """

    source: Any
    values: np.ndarray
    cost: float


class _Tables:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[Any, _Table] = {}
        self._forms = _forms()

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        name = operator_of(value)
        if name == "relax.astype":
            made = self._cast(value)
        elif name in self._forms:
            made = self._computed(graph, value, *self._forms[name])
        else:
            return value
        if made is None or not _finite(made.values):
            return value
        shape, own = shape_of(graph.builder.normalize(value)), shape_of(made.source)
        if shape is None or own is None or not same_shape(shape, own):
            return value
        pays = str(made.values.dtype) in _BYTES and made.cost > self._machine.lookup_cost()
        variable = graph.emit(_lookup(graph, made) if pays else value)
        self._known[variable] = made
        return variable

    def _table(self, value: Any) -> _Table | None:
        from tvm import relax

        return self._known.get(value) if isinstance(value, relax.Var) else None

    def _cast(self, call: Any) -> _Table | None:
        """Between 8 bits and float32; None where a value would not fit, which machines do not agree about."""
        import numpy as np

        known, before, after = self._table(call.args[0]), dtype_of(call.args[0]), str(call.attrs.dtype)
        if before in _BYTES and after == "float32":
            if known is None:
                codes = np.arange(256, dtype=np.uint8).view(before)
                known = _Table(call.args[0], codes, 0)
        elif known is None or before != "float32" or after not in _BYTES or not _fits(known.values, after):
            return None
        return _Table(known.source, known.values.astype(after), known.cost + 1)

    def _computed(self, graph: Graph, call: Any, form: _Form, cost: float) -> _Table | None:
        import numpy as np

        source, operands = None, []
        for argument in call.args:
            known, constant = self._table(argument), constant_of(graph.definition(argument))
            if known is not None and (source is None or source.source.same_as(known.source)):
                cost += 0 if source is known else known.cost
                source = known
                operands.append(known.values)
            elif constant is not None and constant.size == 1 and str(constant.dtype) == "float32":
                operands.append(constant.reshape(()))
            else:
                return None
        if source is None or str(source.values.dtype) != "float32":
            return None
        with np.errstate(all="ignore"):
            values = np.asarray(form(*operands))
        return _Table(source.source, values.astype(np.float32), cost)


def _finite(values: np.ndarray) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all())


def _fits(values: np.ndarray, dtype: str) -> bool:
    import numpy as np

    limits = np.iinfo(dtype)
    return bool(((values >= limits.min) & (values <= limits.max)).all())


def _lookup(graph: Graph, table: _Table) -> Any:
    from tvm import relax, te

    def read(codes: Any, values: Any) -> Any:
        return te.compute(codes.shape, lambda *at: values[codes[at].astype("uint8").astype("int32")], name="lookup")

    return graph.builder.call_te(
        read,
        table.source,
        relax.const(table.values, str(table.values.dtype)),
        primfunc_name_hint="lookup",
        primfunc_attrs={_LOOKUP: True},
    )


def _forms() -> dict[str, tuple[_Form, float]]:
    """Operator -> its float32 arithmetic, and what it costs a vector."""
    import numpy as np

    def function(of: Callable[[float], float]) -> tuple[_Form, float]:
        return lambda x: np.array([of(float(v)) for v in x]), _FUNCTION

    def sigmoid(x: float) -> float:
        return 0.5 + 0.5 * math.tanh(0.5 * x)

    return {
        "relax.add": (np.add, 1),
        "relax.subtract": (np.subtract, 1),
        "relax.multiply": (np.multiply, 1),
        "relax.divide": (np.divide, _DIVISION),
        "relax.maximum": (np.maximum, 1),
        "relax.minimum": (np.minimum, 1),
        "relax.negative": (np.negative, 1),
        "relax.abs": (np.abs, 1),
        "relax.sqrt": (np.sqrt, _DIVISION),
        "relax.nn.relu": (lambda x: np.maximum(x, np.float32(0)), 1),
        "relax.exp": (lambda x: np.exp(x.astype(np.float64)), _FUNCTION),
        "relax.tanh": function(math.tanh),
        "relax.erf": function(math.erf),
        "relax.sigmoid": function(sigmoid),
        "relax.nn.silu": function(lambda x: x * sigmoid(x)),
        "relax.nn.gelu": function(lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))),
    }
