"""Computes in numpy what depends on constants alone.

TVM's own folding compiles and runs a loop nest for each value, which takes longer than the rest of the graph
phases together; what numpy does not know here is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.rewrite import Graph, graph_pass, is_straight, variables_of
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of
from toolchain.tvm.library import load_tvm

if TYPE_CHECKING:
    import numpy as np


def fold_constants() -> Any:
    """The pass."""
    return graph_pass("fold_constants", _Folder)


def fold_remaining() -> Any:
    """TVM's own folding where a value depends on constants alone; else nothing: it legalizes every call to find out."""
    tvm = load_tvm()
    from tvm import relax

    @tvm.transform.module_pass(opt_level=0, name="toolchain.fold_remaining")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        functions = [function for _, function in module.functions_items() if isinstance(function, relax.Function)]
        return relax.transform.FoldConstant()(module) if any(map(_folds, functions)) else module

    return apply


def _folds(function: Any) -> bool:
    """Whether a call of the function has no operand that varies, or that can't be told."""
    from tvm import relax

    if not is_straight(function):
        return True
    fixed: set[Any] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            varies = any(leaf not in fixed for leaf in variables_of(binding.value))
            if not varies and isinstance(binding.value, relax.Call):
                return True
            if not varies:
                fixed.add(binding.var)
    return False


class _Folder:
    def __init__(self) -> None:
        self._known = _evaluators()

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        import numpy as np
        from tvm import relax

        evaluate = self._known.get(operator_of(value))
        if evaluate is None:
            return value
        value = graph.builder.normalize(value)
        shape = shape_of(value)
        operands = [constant_of(graph.definition(a)) for a in value.args if shape_of(a) is not None]
        tensors = [tensor for tensor in operands if tensor is not None]
        if not tensors or len(tensors) < len(operands) or shape is None:
            return value
        if not all(isinstance(size, int) for size in shape):
            return value
        result = evaluate(value, tensors, shape)
        # Keeps a scalar's rank of zero, which ascontiguousarray would not.
        return value if result is None else relax.const(np.array(result, order="C"), dtype_of(value))


_Evaluator = Callable[[Any, "list[np.ndarray]", list[int]], "np.ndarray | None"]


def _evaluators() -> dict[str, _Evaluator]:
    import numpy as np

    def permuted(call: Any, inputs: list[np.ndarray], _shape: list[int]) -> np.ndarray:
        axes = call.attrs.axes
        return inputs[0].transpose(None if axes is None else ints(axes))

    def reshaped(_call: Any, inputs: list[np.ndarray], shape: list[int]) -> np.ndarray:
        return inputs[0].reshape(shape)

    def cast(call: Any, inputs: list[np.ndarray], _shape: list[int]) -> np.ndarray | None:
        kind = dtype_of(call)
        return inputs[0].astype(kind) if kind in _NUMPY_TYPES else None

    def binary(function: Callable[[Any, Any], Any]) -> _Evaluator:
        def evaluate(_call: Any, inputs: list[np.ndarray], shape: list[int]) -> np.ndarray | None:
            # Integer division differs between the two, and an overflow should not pass here unseen.
            if inputs[0].dtype.kind != "f" or len(inputs) != 2:
                return None
            with np.errstate(all="ignore"):
                return np.broadcast_to(function(inputs[0], inputs[1]), shape)

        return evaluate

    def summed(call: Any, inputs: list[np.ndarray], shape: list[int]) -> np.ndarray | None:
        # Sums of integers only: floating-point ones depend on their order.
        if inputs[0].dtype.kind not in "iu":
            return None
        axes = None if call.attrs.axis is None else tuple(ints(call.attrs.axis))
        return np.asarray(inputs[0].sum(axes, dtype=inputs[0].dtype)).reshape(shape)

    def chosen(_call: Any, inputs: list[np.ndarray], shape: list[int]) -> np.ndarray | None:
        return np.broadcast_to(np.where(inputs[0], inputs[1], inputs[2]), shape) if len(inputs) == 3 else None

    views = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
    return {
        "relax.permute_dims": permuted,
        "relax.astype": cast,
        "relax.isnan": lambda _call, inputs, _shape: np.isnan(inputs[0]),
        "relax.where": chosen,
        "relax.sum": summed,
        **dict.fromkeys(views, reshaped),
        "relax.add": binary(np.add),
        "relax.subtract": binary(np.subtract),
        "relax.multiply": binary(np.multiply),
        "relax.divide": binary(np.divide),
    }


_NUMPY_TYPES = frozenset({
    "float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "uint32", "uint64", "bool",
})  # fmt: skip
