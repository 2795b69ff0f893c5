"""NaN survives bounds: the order of operands of ``max`` and ``min`` with a constant.

LLVM code of ``max(a, b)`` is ``a > b ? a : b``, and so are the vector instructions of x86: with a NaN in either, the
result is ``b``.  ``max(x, 0)``, a ReLU, would make a NaN a plausible 0, where PyTorch and ONNX Runtime give NaN; with
the constant first it costs the same and NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm


def nan_order() -> Any:
    """A pass over lowered loop nests, the last before code generation: no simplifier may order operands after it."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    def is_constant(value: Any) -> bool:
        return isinstance(value.value if isinstance(value, tirx.Broadcast) else value, tirx.FloatImm)

    def ordered(value: Any) -> Any:
        if not is_constant(value.b) or is_constant(value.a):
            return value
        return type(value)(value.b, value.a)

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.nan_order")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        body = tvm_ffi.structural_map(function.body, (tirx.Max, ordered))
        return function.with_body(tvm_ffi.structural_map(body, (tirx.Min, ordered)))

    return tvm.ir.transform.Sequential([apply])
