"""The peak of one core: multiply-adds on registers alone, compiled by TVM for the profile.

``python cpu_peak.py PROFILE`` prints one line of JSON: ``{"gflops": ...}``, and ``"int8_gops"`` where the profile
has VNNI (u8 x s8 products added in int32, an operation per product and per addition, as for fp32).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
from cpu_models import ROOT

STEPS = 1 << 18
REPEATS = 40

# One accumulator each for the latency of an instruction times the instructions begun per cycle: 4 x 2 on all
# current x86 and ARM cores.  12 leaves room for 5 x 2 and, with 16 registers, for the operands.
ACCUMULATORS = 12

_FP32 = """
# from tvm.script import tirx as T
@T.prim_func
def main(x: T.Buffer(({lanes},), "float32"), y: T.Buffer(({size},), "float32")):
    T.func_attr({{"global_symbol": "main", "tirx.noalias": True}})
    sums = T.alloc_buffer(({size},), "float32", scope="local")
    for r in T.unroll({count}):
        for v in T.vectorized({lanes}):
            sums[r * {lanes} + v] = y[r * {lanes} + v]
    for step in range({steps}):
        for r in T.unroll({count}):
            for v in T.vectorized({lanes}):
                sums[r * {lanes} + v] = sums[r * {lanes} + v] * x[v] + x[v]
    for r in T.unroll({count}):
        for v in T.vectorized({lanes}):
            y[r * {lanes} + v] = sums[r * {lanes} + v]
"""

# LLVM 22's intrinsic takes 64 bytes, not the 16 words that hold them.
_VNNI = """
# from tvm.script import tirx as T
@T.prim_func
def main(u: T.Buffer(({bytes},), "uint8"), s: T.Buffer(({bytes},), "int8"), y: T.Buffer(({size},), "int32")):
    T.func_attr({{"global_symbol": "main", "tirx.noalias": True}})
    sums = T.alloc_buffer(({size},), "int32", scope="local")
    for r in T.unroll({count}):
        for v in T.vectorized({lanes}):
            sums[r * {lanes} + v] = y[r * {lanes} + v]
    for step in range({steps}):
        for r in T.unroll({count}):
            sums[T.ramp(r * {lanes}, 1, {lanes})] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512"),
                sums[T.ramp(r * {lanes}, 1, {lanes})],
                T.reinterpret("int8x{bytes}", u[T.ramp(0, 1, {bytes})]),
                s[T.ramp(0, 1, {bytes})],
                dtype="int32x{lanes}",
            )
    for r in T.unroll({count}):
        for v in T.vectorized({lanes}):
            y[r * {lanes} + v] = sums[r * {lanes} + v]
"""


def peak(source: str, profile: Any, inputs: list[Any], total: Any) -> float:
    """Vector instructions per second of the loop in ``source``; the best of many short runs.

    Args:
        source: TVMScript with places for the sizes.
        profile: what to compile for.
        inputs: arguments before the accumulators.
        total: what one accumulator holds after all steps and runs.
    """
    from toolchain.tvm.library import load_tvm

    tvm = load_tvm()
    from tvm.script import from_source

    lanes = profile.cpu.vector_bits // 32
    size = lanes * ACCUMULATORS
    text = source.format(lanes=lanes, bytes=4 * lanes, size=size, count=ACCUMULATORS, steps=STEPS)
    module = tvm.IRModule({"main": from_source(text)})
    built = tvm.compile(module, target=tvm.target.Target(profile.tvm_target()))
    tensors = [tvm.runtime.tensor(array) for array in [*inputs, np.zeros(size, total.dtype)]]
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        built["main"](*tensors)
        best = min(best, time.process_time() - start)
    np.testing.assert_allclose(tensors[-1].numpy(), total, rtol=1e-6)
    return STEPS * ACCUMULATORS / best


def _has(profile: Any, feature: str) -> bool:
    """Whether the profile's processor has an LLVM feature, by itself or by its attributes."""
    import tvm

    return bool(tvm.target.codegen.target_has_features(feature, tvm.target.Target(profile.tvm_target())))


def main() -> None:
    """See the module's docstring."""
    sys.path.insert(0, str(ROOT))
    from toolchain.target import load_target

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    profile = load_target(sys.argv[1])
    lanes = profile.cpu.vector_bits // 32
    # s = s / 2 + 1/2 has the limit 1.
    halves = np.full(lanes, 0.5, np.float32)
    answer = {"gflops": peak(_FP32, profile, [halves], np.float32(1)) * lanes * 2 / 1e9}
    if profile.cpu.vector_bits == 512 and _has(profile, "avx512vnni"):
        ones = [np.ones(4 * lanes, np.uint8), np.ones(4 * lanes, np.int8)]
        total = np.int32(4 * STEPS * REPEATS)
        answer["int8_gops"] = peak(_VNNI, profile, ones, total) * lanes * 4 * 2 / 1e9
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
