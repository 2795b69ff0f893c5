"""The ahead-of-time form of an engine: kernels, weights and a plan in C, with no other run-time.

:mod:`~toolchain.tvm.aot.program` reads a compiled Relax function as a list of kernel calls;
:mod:`~toolchain.tvm.aot.arena` gives every buffer its place; :mod:`~toolchain.tvm.aot.text` writes the plan;
:mod:`~toolchain.tvm.aot.kernels` makes the kernels' object; :mod:`~toolchain.tvm.aot.library` links them with the
sources of ``toolchain/runtime/edge``.
"""
