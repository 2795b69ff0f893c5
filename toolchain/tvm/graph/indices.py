"""Indices that are only known at run time, kept inside of the tensor that they point into.

ONNX calls an index outside of it an error; TVM's loop nests read or write whatever lies there.  Here such an index
means the nearest element: never memory of someone else.  Constant indices that are surely inside stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.values import constant_of, dtype_of, operator_of, shape_of
from toolchain.tvm.library import Refusal, load_tvm

if TYPE_CHECKING:
    import numpy as np

_CLAMPED = frozenset({
    "relax.take", "relax.gather_elements", "relax.gather_nd", "relax.scatter_elements", "relax.scatter_nd",
    "relax.vision.roi_align",
})  # fmt: skip


def clamp_indices() -> Any:
    """The pass; functions with control flow are rewritten too.

    It comes after constants are folded, so that indices that depend on constants alone are seen to be constant.
    """
    tvm = load_tvm()
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Clamp(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            if operator_of(call) not in _CLAMPED or (operator_of(call) == "relax.take" and call.attrs.mode != "fast"):
                return call
            index = call.args[1]
            bound = self.lookup_binding(index) if isinstance(index, relax.Var) else index
            return _clamped(call, None if bound is None else constant_of(bound), self.builder_.emit)

    @tvm.transform.module_pass(opt_level=0, name="toolchain.clamp_indices")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        names = [v for v, function in module.functions_items() if isinstance(function, relax.Function)]
        if not any(_indexes(module[name]) for name in names):
            return module
        visitor = Clamp(module)
        for name in names:
            visitor.builder_.update_func(name, visitor.visit_expr(module[name]))
        return visitor.builder_.get()

    return apply


def _indexes(function: Any) -> bool:
    from tvm import relax

    found: list[Any] = []
    relax.analysis.post_order_visit(function, lambda e: found.append(e) if operator_of(e) in _CLAMPED else None)
    return bool(found)


def _clamped(call: Any, known: np.ndarray | None, emit: Any) -> Any:
    """The call with indices that can't leave the data; ``known``: their value, if constant."""
    from tvm import relax

    name = operator_of(call)
    data, index, attrs = call.args[0], call.args[1], call.attrs
    sizes = shape_of(data)
    if sizes is None:
        raise Refusal(f"{name.removeprefix('relax.')} of a tensor whose number of axes is only known at run time")
    if name == "relax.vision.roi_align":
        return relax.Call(call.op, [data, _rois(sizes[0], index, emit), *call.args[2:]], attrs, call.ty_args)
    pointed = _pointed(call, sizes)
    # TVM's loop nest of scatter_elements counts negative indices from the end itself.
    least = [-size for size in pointed] if name == "relax.scatter_elements" else [0] * len(pointed)
    if known is not None and _inside(known, pointed, least):
        return call
    if name == "relax.take":
        return relax.op.take(data, index, attrs.axis, mode="clip")
    below = emit(relax.op.minimum(index, _vector([size - 1 for size in pointed], dtype_of(index))))
    safe = emit(relax.op.maximum(below, _vector(least, dtype_of(index))))
    return relax.Call(call.op, [data, safe, *call.args[2:]], attrs, call.ty_args)


def _pointed(call: Any, sizes: list[Any]) -> list[Any]:
    """The sizes of the axes that the indices point into: one, or one for each coordinate in their last axis."""
    name = operator_of(call)
    if name in ("relax.gather_nd", "relax.scatter_nd"):
        shape = shape_of(call.args[1])
        if not shape or not isinstance(shape[-1], int):
            raise Refusal(f"{name.removeprefix('relax.')} with a number of coordinates only known at run time")
        first = int(call.attrs.batch_dims) if name == "relax.gather_nd" else 0
        return sizes[first : first + shape[-1]]
    axis = call.attrs.axis
    return [sizes[0 if axis is None else int(axis)]]


def _inside(indices: np.ndarray, sizes: list[Any], least: list[Any]) -> bool:
    """Whether constant indices surely lie inside; a size that varies is at least 1."""
    if not indices.size:
        return True
    columns = indices.reshape(-1, len(sizes)) if len(sizes) > 1 else indices.reshape(-1, 1)
    known = [(low, size) if isinstance(size, int) else (0, 1) for low, size in zip(least, sizes, strict=True)]
    pairs = zip(columns.min(0).tolist(), columns.max(0).tolist(), known, strict=True)
    return all(low <= smallest and largest < size for smallest, largest, (low, size) in pairs)


def _vector(sizes: list[Any], dtype: str) -> Any:
    """Sizes as a tensor (n), constant where they are."""
    import numpy as np
    from tvm import relax

    if all(isinstance(size, int) for size in sizes):
        return relax.const(np.array(sizes, dtype), dtype)
    tensor = relax.op.shape_to_tensor(relax.ShapeExpr(sizes))
    return tensor if dtype == "int64" else relax.op.astype(tensor, dtype)


def _rois(batch: Any, rois: Any, emit: Any) -> Any:
    """Regions (n, 5) whose first column, the image's place in the batch, is one that exists."""
    import numpy as np
    from tvm import relax

    dtype = dtype_of(rois)
    last = relax.op.concat([_vector([batch - 1], dtype), relax.const(np.full(4, np.inf, dtype), dtype)])
    least = relax.const(np.array([0, *[-np.inf] * 4], dtype), dtype)
    return emit(relax.op.maximum(emit(relax.op.minimum(rois, last)), least))
