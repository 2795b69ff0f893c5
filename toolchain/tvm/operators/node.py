"""What a converter of one ONNX operator gets, and how it declines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Unsupported(Exception):  # noqa: N818 - becomes a refusal that names the node
    """This form of the operator can't be compiled; the message says which part, in one line."""


@dataclass(frozen=True, slots=True)
class OpNode:
    """One ONNX node during the import.

    Attributes:
        builder: TVM's block builder.
        operator: the operator's name.
        inputs: Relax expressions (variables, constants, or shapes where ONNX has shape tensors); None if left out.
        attrs: attribute name -> value as TVM's importer parses it (strings are bytes, lists are tuples).
        opset: version of the default operator set.
        outputs: number of outputs of the node, unused ones included.
        again: converts the node as TVM does, with other attributes.
        inline: converts a graph attribute in place, given its inputs; gives its outputs.
    """

    builder: Any
    operator: str
    inputs: Sequence[Any]
    attrs: Mapping[str, Any]
    opset: int
    outputs: int
    again: Callable[[Mapping[str, Any]], Any]
    inline: Callable[[Any, Sequence[Any]], list[Any]]

    def default(self) -> Any:
        """Converts the node as TVM does."""
        return self.again(self.attrs)

    def has(self, index: int) -> bool:
        """Whether input ``index`` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> Any:
        """Input ``index``, None if left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def emit(self, expr: Any) -> Any:
        """``expr`` bound to a variable, so that it is computed once however often it is used."""
        return self.builder.emit(expr)

    def emit_te(self, compute: Callable[..., Any], *args: Any, name: str) -> Any:
        """A loop nest over tensor expressions; ``name`` is the function's name in the IR."""
        return self.builder.emit_te(compute, *args, primfunc_name_hint=name)

    def constant(self, index: int, what: str = "") -> Any:
        """The value of input ``index`` as a numpy array, None if it is left out.

        Raises:
            Unsupported: it is only known at run time.
        """
        value = self.input(index)
        if value is None:
            return None
        array = constant_value(value)
        if array is None:
            raise Unsupported(f"{what or f'input {index}'} must be constant")
        return array

    def shape(self, index: int) -> tuple[int, ...]:
        """The static shape of input ``index``.

        Raises:
            Unsupported: a size or the rank is unknown until run time.
        """
        return static_shape(self.input(index), f"input {index}")

    def rank(self, index: int) -> int:
        """The number of axes of input ``index``.

        Raises:
            Unsupported: it is unknown until run time.
        """
        rank = int(self.input(index).ty.ndim)
        if rank < 0:
            raise Unsupported(f"input {index} has no fixed number of axes")
        return rank

    def dtype(self, index: int) -> str:
        """E.g. ``"float32"``."""
        return dtype_of(self.input(index))

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def texts(self, name: str) -> list[str]:
        """An attribute that is a list of strings."""
        return [v.decode() if isinstance(v, bytes) else str(v) for v in self.attrs.get(name, ())]

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attrs.get(name, default))

    def axis(self, name: str, default: int, rank: int) -> int:
        """An axis attribute, counted from the front."""
        axis = self.integer(name, default)
        return axis + rank if axis < 0 else axis


Converter = Callable[[OpNode], Any]
"""Gives the node's output, or a ``relax.Tuple`` of them."""


def constant(array: Any) -> Any:
    """A Relax constant of a numpy array's own element type (``relax.const`` alone narrows 64 bits to 32)."""
    import numpy as np
    import tvm
    from tvm import relax

    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(np.shape(array))))


def dtype_of(expr: Any) -> str:
    """The element type of a Relax tensor."""
    return str(expr.ty.dtype.dtype) if hasattr(expr.ty.dtype, "dtype") else str(expr.ty.dtype)


def static_shape(expr: Any, what: str) -> tuple[int, ...]:
    """The shape of a Relax tensor whose sizes are all known.

    Raises:
        Unsupported: they are not.
    """
    shape = getattr(expr.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        raise Unsupported(f"the shape of {what} is only known at run time")
    sizes = [getattr(value, "value", None) for value in shape.values]
    if any(size is None for size in sizes):
        raise Unsupported(f"the shape of {what} is dynamic")
    return tuple(int(size) for size in sizes if size is not None)


def constant_value(expr: Any) -> np.ndarray | None:
    """The value of a Relax constant or of a static shape, else None."""
    import numpy as np
    from tvm import ir, relax

    if isinstance(expr, ir.GenericConst):
        value: np.ndarray = expr.value.numpy()
        return value
    if isinstance(expr, relax.ShapeExpr):
        sizes = [getattr(value, "value", None) for value in expr.values]
        if all(size is not None for size in sizes):
            return np.array(sizes, np.int64)
    return None
