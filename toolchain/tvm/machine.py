"""What the compile pipeline needs to know of a target, derived from its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.choices import Choices
from toolchain.tvm.library import load_tvm, one_line
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.nests import Choice, Nest
from toolchain.tvm.tiles import Room

_IN_ORDER = frozenset({"cortex-a34", "cortex-a35", "cortex-a53"})
"""LLVM's names of 64-bit Arm cores that it schedules for as in-order, without dot products."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts of a target that rules are chosen by.

    Attributes:
        target: TVM's target, e.g. ``{"kind": "llvm", "mtriple": ..., "mcpu": ...}``; may hold a ``"host"``.
        kind: ``"cpu"`` or ``"cuda"``.
        arch: architecture of the host code: ``"x86_64"`` or ``"aarch64"``.
        vector_bits: width of a vector register in bits (CPU).
        registers: number of vector registers (CPU).
        l1d_kib: level-1 data cache of a core in KiB (CPU).
        l2_kib: level-2 cache of a core in KiB (CPU).
        choices: answers which tile a loop nest takes: a record of tuning, or the rule's.
    """

    target: dict[str, Any]
    kind: str
    arch: str
    vector_bits: int = 128
    registers: int = 16
    l1d_kib: int = 32
    l2_kib: int = 512
    choices: Choices = field(default_factory=Choices, compare=False)

    def lanes(self, dtype: str) -> int:
        """Elements of ``dtype`` in one vector register."""
        return max(1, self.vector_bits // dtype_bits(dtype))

    def room(self, depth: int, dtype: str) -> Room:
        """What tiles of a reduction over ``depth`` elements of ``dtype`` have to fit in."""
        panel = depth * self.lanes(dtype) * dtype_bits(dtype) // 8
        return Room(self.registers, self.l1d_kib * 1024, panel)

    def choose(
        self,
        dtype: str,
        data: Sequence[Any],
        weights: Sequence[int],
        conv: Conv2d | None = None,
        *,
        plain: bool = False,
    ) -> Choice:
        """The tile of a convolution or product; arguments as in :meth:`toolchain.tvm.nests.Nest.of`."""
        nest = Nest.of(dtype, data, weights, conv, self.vector_bits, self.registers, plain=plain)
        return self.choices.choose(nest, data, self)

    def dot(self) -> str:
        """The instruction for products of 8-bit values: a key of :data:`toolchain.tvm.intrinsics.DATA_TYPE`, or ""."""
        if self.kind != "cpu":
            return ""
        load_tvm()
        from tvm.target.codegen import llvm_cpu_has_features

        target = self.tvm_target()

        def has(*features: str) -> bool:
            return all(llvm_cpu_has_features(feature, target) for feature in features)

        if self.arch == "aarch64":
            if self.vector_bits != 128 or not has("neon"):
                return ""
            return ("i8mm" if has("i8mm") else "sdot") if has("dotprod") else "neon"
        if self.arch == "armv7l":
            return "neon32" if self.vector_bits == 128 and has("neon") else ""
        if self.arch != "x86_64" or not has("avx2"):
            return ""
        if self.vector_bits == 512:
            return "vnni512" if has("avx512vnni") else ""
        if self.vector_bits != 256:
            return ""
        return "vnni256" if has("avxvnni") or has("avx512vnni", "avx512vl") else "avx2"

    def lookup(self) -> str:
        """How whole vectors read a table of 256 bytes: a form of :mod:`toolchain.tvm.lookups`, or ""."""
        if self.kind != "cpu" or self.arch != "x86_64" or self.vector_bits != 512:
            return ""
        load_tvm()
        from tvm.target.codegen import llvm_cpu_has_features

        target = self.tvm_target()
        if llvm_cpu_has_features("avx512vbmi", target):
            return "vbmi"
        return "words" if llvm_cpu_has_features("avx512bw", target) else ""

    def lookup_cost(self) -> int:
        """Instructions that it takes to read one for a vector of int32 lanes: a few, or three for each lane."""
        return {"vbmi": 12, "words": 16}.get(self.lookup(), 3 * self.lanes("int32"))

    def code_target(self) -> Any:
        """The target that machine code is generated for, with options of LLVM's.

        For a core that runs in order LLVM 22 starts many products before it adds the first.  Where it looks at
        registers meanwhile, it moves sums of the multiplying loop onto the stack; by latency alone it does not.
        """
        if self.target.get("mcpu") not in _IN_ORDER or self.dot() != "neon":
            return self.tvm_target()
        return replace(self, target={**self.target, "cl-opt": ["-misched-regpressure=0"]}).tvm_target()

    def tvm_target(self) -> Any:
        """The ``tvm.target.Target``.

        Raises:
            ToolchainError: BAD_TARGET: TVM rejects it.
        """
        tvm = load_tvm()
        spec = dict(self.target)
        if self.kind == "cuda":
            # Without a host TVM would compile the host code for the machine that runs the compiler.
            spec.setdefault("host", {"kind": "llvm", "mtriple": f"{self.arch}-linux-gnu"})
        try:
            return tvm.target.Target(spec)
        except Exception as error:
            raise ToolchainError(
                f"TVM rejects the target: {one_line(error)}", where="target.tvm.target", code=ExitCode.BAD_TARGET
            ) from error


def dtype_bits(dtype: str) -> int:
    """Bits of one element as it lies in memory: 32 for ``"float32"``, 8 for ``"bool"``."""
    return max(8, int("".join(c for c in dtype if c.isdigit()) or 8))
