"""What graph passes ask of Relax expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import load_tvm

if TYPE_CHECKING:
    import numpy as np


def shape_of(value: Any) -> list[Any] | None:
    """Sizes of a tensor, ints where static, else TIR expressions; None if it isn't a tensor of known rank."""
    shape = getattr(value.ty, "shape", None)
    if shape is None:
        return None
    return [int(size) if hasattr(size, "value") else size for size in shape]


def dtype_of(value: Any) -> str:
    """A tensor's dtype, or ``""``."""
    return str(getattr(value.ty, "dtype", ""))


def constant_of(value: Any) -> np.ndarray | None:
    """The value of a constant tensor, else None."""
    from tvm import ir

    if isinstance(value, ir.GenericConst) and hasattr(value.value, "numpy"):
        return value.value.numpy()  # type: ignore[no-any-return]
    return None


def operator_of(value: Any) -> str:
    """``"relax.add"`` for a call of that operator, else ``""``."""
    from tvm import ir, relax

    if isinstance(value, relax.Call) and isinstance(value.op, ir.Op):
        return str(value.op.name)
    return ""


def ints(values: Any) -> list[int]:
    """The Python ints of an attribute."""
    return [int(value) for value in values]


def same_shape(a: list[Any], b: list[Any]) -> bool:
    """Whether two shapes are surely equal."""
    tvm = load_tvm()
    if len(a) != len(b):
        return False
    analyzer = tvm.sym.Analyzer()
    return all(
        x == y if isinstance(x, int) and isinstance(y, int) else analyzer.can_prove_equal(x, y)
        for x, y in zip(a, b, strict=True)
    )
