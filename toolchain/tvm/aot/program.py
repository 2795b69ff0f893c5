"""A compiled Relax function as a program: dimensions, tensors, buffers, weights and kernel calls in order.

The function is taken where every call writes into given buffers and nothing is left but kernel calls, reshapes
and allocations (the pipeline's phase ``dataflow``).  Whatever else a function does needs TVM's virtual machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from toolchain.specs import DTYPES
from toolchain.tvm.aot.sizes import Expression, PlanError, c_expression, product
from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import dtype_bits

if TYPE_CHECKING:
    import numpy as np

Place = Literal["input", "output", "buffer", "weight"]

_RESHAPES = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor's memory: which input, output, buffer or weight it is."""

    place: Place
    index: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: numpy dtype name; each axis a size or an expression over dimensions."""

    name: str
    dtype: str
    shape: tuple[Expression, ...]

    @property
    def size(self) -> Expression:
        """In bytes."""
        return product((*self.shape, dtype_bits(self.dtype) // 8))


@dataclass(slots=True)
class Buffer:
    """Memory for a value between two calls: its size in bytes, and the first and last step that touch it."""

    size: Expression
    first: int = -1
    last: int = -1


@dataclass(frozen=True, slots=True)
class Call:
    """One step: a kernel and what it is given.  The kernel ``""`` copies its first argument to its second."""

    kernel: str
    arguments: tuple[Value | Expression, ...]


@dataclass(slots=True)
class Program:
    """What runs.  ``dims`` are the names of the symbolic sizes, in the order that expressions number them."""

    dims: tuple[str, ...] = ()
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def static(self) -> bool:
        return not self.dims


def read_program(module: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
    """The program of ``module["main"]``.

    Args:
        module: an IRModule after the phase ``dataflow``.
        inputs: names of its parameters, in order.
        outputs: names of its results, in order.

    Raises:
        PlanError: it calls the virtual machine's run-time, or its sizes depend on values.
    """
    return _Reader(module).read(inputs, outputs)


class _Reader:
    def __init__(self, module: Any) -> None:
        self._tvm = load_tvm()
        self._module = module
        self._program = Program()
        self._values: dict[Any, Any] = {}
        self._dims: dict[Any, int] = {}
        self._weights: dict[Any, Value] = {}
        self._sizes_of: dict[str, list[tuple[int, int]]] = {}

    def read(self, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
        main = self._module["main"]
        self._parameters(main, inputs)
        body = main.body
        for block in body.blocks:
            for binding in block.bindings:
                self._binding(binding)
        results = self._value(body.body)
        results = results if isinstance(results, tuple) else (results,)
        became: dict[Value, Value] = {}
        for name, value, type_ in zip(outputs, results, self._types(body.body), strict=True):
            self._output(Tensor(name, str(type_.dtype), self._shape(type_)), value, became)
        return _with_lifetimes(self._program)

    def _parameters(self, main: Any, inputs: Sequence[str]) -> None:
        for index, parameter in enumerate(main.params):
            type_ = parameter.ty
            for size in type_.shape:
                if isinstance(size, self._tvm.ir.Var) and size not in self._dims:
                    self._dims[size] = len(self._dims)
            self._values[parameter] = Value("input", index)
            check_dtype(str(type_.dtype))
        self._program.dims = tuple(str(variable.name) for variable in self._dims)
        for name, parameter in zip(inputs, main.params, strict=True):
            self._program.inputs.append(Tensor(name, str(parameter.ty.dtype), self._shape(parameter.ty)))

    def _shape(self, type_: Any) -> tuple[Expression, ...]:
        if type_.shape is None:
            raise PlanError("a shape is known only when the model runs")
        return tuple(self._size(size) for size in type_.shape)

    def _size(self, size: Any) -> Expression:
        return c_expression(size, self._dims)

    def _types(self, value: Any) -> list[Any]:
        type_ = value.ty
        return list(type_.fields) if hasattr(type_, "fields") else [type_]

    def _binding(self, binding: Any) -> None:
        relax = self._tvm.relax
        if isinstance(binding, relax.MatchCast):
            raise PlanError("a size depends on a value")
        value = binding.value
        if not isinstance(value, relax.Call):
            self._values[binding.var] = self._value(value)
            return
        operator = value.op
        if isinstance(operator, relax.GlobalVar):
            self._call(operator.name_hint, value.args)
            return
        name = getattr(operator, "name", None)
        if name == "relax.builtin.alloc_tensor":
            self._program.buffers.append(Buffer(self._bytes(binding.var.ty)))
            self._values[binding.var] = Value("buffer", len(self._program.buffers) - 1)
        elif name in _RESHAPES:
            self._values[binding.var] = self._value(value.args[0])
        else:
            raise PlanError(f"it calls {name or getattr(operator, 'global_symbol', operator)}")

    def _bytes(self, type_: Any) -> Expression:
        check_dtype(str(type_.dtype))
        return product((*self._shape(type_), dtype_bits(str(type_.dtype)) // 8))

    def _value(self, value: Any) -> Any:
        relax = self._tvm.relax
        if isinstance(value, relax.Tuple):
            return tuple(self._value(part) for part in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if isinstance(value, self._tvm.ir.GenericConst) and hasattr(value.value, "numpy"):
            return self._weight(value.value)
        if value in self._values:
            return self._values[value]
        raise PlanError(f"it uses a value of the kind {type(value).__name__}")

    def _weight(self, tensor: Any) -> Value:
        """One weight for each value, however many constants hold it: every step of a recurrent network has its own."""
        check_dtype(str(tensor.dtype))
        array = tensor.numpy()
        key = (array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).digest())
        if key not in self._weights:
            self._weights[key] = Value("weight", len(self._program.weights))
            self._program.weights.append(array)
        return self._weights[key]

    def _call(self, kernel: str, arguments: Sequence[Any]) -> None:
        given: list[Value | Expression] = []
        types: list[Any] = []
        for argument in arguments:
            if isinstance(argument, self._tvm.relax.ShapeExpr):
                given += [self._size(size) for size in argument.values]
                types += [None] * len(argument.values)
            elif isinstance(argument.ty, self._tvm.ir.PrimType):
                given.append(self._size(argument))
                types.append(None)
            else:
                given.append(self._value(argument))
                types.append(argument.ty)
        for parameter, axis in self._free_sizes(kernel):
            given.append(self._shape(types[parameter])[axis])
        self._program.calls.append(Call(kernel, tuple(given)))

    def _free_sizes(self, kernel: str) -> list[tuple[int, int]]:
        """Of a kernel, which is looked at once however often it is called."""
        if kernel not in self._sizes_of:
            check_calls(self._module[kernel])
            self._sizes_of[kernel] = free_sizes(self._module[kernel])
        return self._sizes_of[kernel]

    def _output(self, tensor: Tensor, value: Value, became: dict[Value, Value]) -> None:
        """Lets the kernels write an output where it belongs, or copies it there.

        Args:
            tensor: the output.
            value: where it is.
            became: the buffers that are outputs now; extended.
        """
        program = self._program
        place = Value("output", len(program.outputs))
        program.outputs.append(tensor)
        value = became.get(value, value)
        if value.place != "buffer":
            program.calls.append(Call("", (value, place, tensor.size)))
            return
        became[value] = place
        program.calls = [replace_value(call, value, place) for call in program.calls]


def check_dtype(dtype: str) -> None:
    """Raises PlanError for a dtype that no interface here can carry: kernels in it follow conventions of TVM's own."""
    if dtype not in DTYPES:
        raise PlanError(f"it holds values of the dtype {dtype}")


def check_calls(function: Any) -> None:
    """Raises PlanError for a kernel that calls functions of TVM's run-time by name, such as its sorting."""
    import tvm_ffi

    tvm = load_tvm()
    named: list[str] = []

    def look(call: Any) -> Any:
        name = str(getattr(call.op, "name", ""))
        if "packed" in name:
            named.append(str(call.args[0]) if call.args else name)
        return call

    tvm_ffi.structural_map(function.body, (tvm.ir.Call, look))
    if named:
        raise PlanError(f"a kernel calls TVM's run-time: {named[0]}")


def replace_value(call: Call, old: Value, new: Value) -> Call:
    """``call`` with one value in place of another."""
    return replace(call, arguments=tuple(new if a == old else a for a in call.arguments))


def free_sizes(function: Any) -> list[tuple[int, int]]:
    """Where a kernel's symbolic sizes come from: (parameter, axis) of each that is no parameter itself.

    Raises:
        PlanError: one that is the size of no axis.
    """
    tvm = load_tvm()
    given = {parameter for parameter in function.params if not hasattr(parameter.ty, "shape")}
    found: dict[Any, tuple[int, int]] = {}
    needed: list[Any] = []
    for index, parameter in enumerate(function.params):
        for axis, size in enumerate(getattr(parameter.ty, "shape", ())):
            if isinstance(size, tvm.ir.Var):
                found.setdefault(size, (index, axis))
            needed += [v for v in tvm.tirx.analysis.undefined_vars(size) if v not in given and v not in needed]
    missing = [variable for variable in needed if variable not in found]
    if missing:
        raise PlanError(f"the size {missing[0]} of a kernel is the size of no axis")
    return [found[variable] for variable in needed]


def _with_lifetimes(program: Program) -> Program:
    """Sets the buffers' first and last steps, and drops buffers that nothing touches."""
    for step, call in enumerate(program.calls):
        for argument in call.arguments:
            if isinstance(argument, Value) and argument.place == "buffer":
                buffer = program.buffers[argument.index]
                buffer.first = step if buffer.first < 0 else buffer.first
                buffer.last = step
    kept = [index for index, buffer in enumerate(program.buffers) if buffer.first >= 0]
    numbers: Mapping[Value, Value] = {Value("buffer", old): Value("buffer", new) for new, old in enumerate(kept)}
    program.buffers = [program.buffers[index] for index in kept]
    program.calls = [
        replace(call, arguments=tuple(numbers.get(a, a) if isinstance(a, Value) else a for a in call.arguments))
        for call in program.calls
    ]
    return program
