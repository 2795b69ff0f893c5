"""Functions that TVM registers only where its compiler is, and that engines of its virtual machine call by name.

The edge runtime has the same in C (``edge/src/tvm_functions.c``).
"""

from __future__ import annotations

from typing import Any

FUNCTIONS = ("relax.run.nonzero", "relax.run.shape_to_tensor")
"""What engines may call of TVM's functions in Python."""


def register() -> None:
    """Registers those of :data:`FUNCTIONS` that TVM, which must be imported, does not have already."""
    import tvm

    for name, function in zip(FUNCTIONS, (_nonzero, _shape_to_tensor), strict=True):
        if tvm.get_global_func(name, allow_missing=True) is None:
            tvm.register_global_func(name, function)


def _nonzero(tensor: Any) -> Any:
    """Indices of the elements that are not 0, int64[rank, count]; a scalar counts as an array of one element."""
    import numpy as np
    import tvm

    return tvm.runtime.tensor(np.stack(np.atleast_1d(tensor.numpy()).nonzero()))


def _shape_to_tensor(shape: Any) -> Any:
    """The sizes of a shape, int64[rank]."""
    import numpy as np
    import tvm

    return tvm.runtime.tensor(np.array(list(shape), np.int64))
