"""Keeps small local buffers on the stack, where LLVM turns them into registers.

TVM 0.27 leaves an allocation to LLVM only below 1024 bytes; a tile of sixteen or more 64-byte vectors would
come from the run-time's workspace allocator instead, and whether its accumulators then stay in registers depends
on what LLVM can prove about aliases: with a symbolic batch it could not, and convolutions took 2.4 times as long.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import dtype_bits

STACK_LIMIT = 16384
"""Largest buffer put on the stack, in bytes: thread stacks are small on some systems."""


def stack_locals() -> Any:
    """A pass over lowered loop nests, before TVM lowers allocations to calls of the run-time."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    def keep(statement: Any) -> Any:
        buffer = statement.buffer
        if str(buffer.scope()) != "local" or not all(hasattr(size, "value") for size in buffer.shape):
            return statement
        total = dtype_bits(str(buffer.dtype)) // 8
        for size in buffer.shape:
            total *= int(size)
        if total > STACK_LIMIT:
            return statement
        return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.const(True, "bool")})

    @tirx.transform.prim_func_pass(opt_level=0, name="toolchain.stack_locals")  # type: ignore[untyped-decorator]
    def apply(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, keep)))

    return tvm.ir.transform.Sequential([apply])
