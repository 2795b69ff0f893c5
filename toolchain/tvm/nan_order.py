"""NaN survives bounds: the order of operands of ``max`` and ``min`` with a constant.

LLVM code of ``max(a, b)`` is ``a > b ? a : b``, and so are the vector instructions of x86: with a NaN in either, the
result is ``b``.  ``max(x, 0)``, a ReLU, would make a NaN a plausible 0, where PyTorch and ONNX Runtime give NaN; with
the constant first it costs the same and NaN stays NaN.  On 64-bit Arm a comparison and a choice are two instructions,
often with a copy; ``fmax`` and ``fmin`` are one and keep NaN by definition (``llvm.maximum``, ``llvm.minimum``).
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm


def nan_order(arch: str) -> Any:
    """A pass over lowered loop nests, the last before code generation: no simplifier may order operands after it.

    Args:
        arch: of the target, as in :class:`toolchain.tvm.machine.Machine`.
    """
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    def is_constant(value: Any) -> bool:
        return isinstance(value.value if isinstance(value, tirx.Broadcast) else value, tirx.FloatImm)

    def ordered(value: Any) -> Any:
        first, second = (value.a, value.b) if is_constant(value.a) else (value.b, value.a)
        if not is_constant(first) or is_constant(second):
            return value
        dtype = str(value.ty.dtype)
        if arch == "aarch64" and dtype.startswith("float32"):
            name = "llvm.maximum" if isinstance(value, tirx.Max) else "llvm.minimum"
            return tirx.call_llvm_pure_intrin(dtype, name, first, second)
        return type(value)(first, second)

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.nan_order")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        body = tvm_ffi.structural_map(function.body, (tirx.Max, ordered))
        return function.with_body(tvm_ffi.structural_map(body, (tirx.Min, ordered)))

    return tvm.ir.transform.Sequential([apply])
