"""Links an engine ahead of time: the kernels, the weights, the plan and the sources of the edge runtime."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.tvm.aot.kernels import kernels_object, scalar_types, workspaces
from toolchain.tvm.aot.program import Program, read_program
from toolchain.tvm.aot.text import plan_text
from toolchain.tvm.blob import write_object
from toolchain.tvm.elf import read_elf
from toolchain.tvm.link import WASM

if TYPE_CHECKING:
    import numpy as np

    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine

SOURCES = Path(__file__).parents[2] / "runtime" / "edge"
"""Where the C sources of the engine lie, with their headers."""

ENGINE_SOURCES = ("engine.c", "threads.c")
WEIGHTS = "tc_weights"
_ALIGNMENT = 64
_ALIGN_POWER = 6

_OF_LIBC = frozenset(
    (
        "__errno_location", "__memcpy_chk", "__sched_cpucount", "__stack_chk_fail", "__tls_get_addr", "bcmp", "calloc",
        "free", "malloc", "memcmp", "memcpy", "memmove", "memset", "pthread_create", "pthread_join",
        "pthread_mutex_destroy", "pthread_mutex_init", "pthread_mutex_lock", "pthread_mutex_unlock",
        "sched_getaffinity", "sched_yield", "sem_destroy", "sem_init", "sem_post", "sem_wait", "sysconf",
    )
)  # fmt: skip
"""What engines take of the C library itself; with any other function libm is loaded too."""


@dataclass(frozen=True, slots=True)
class AheadOfTime:
    """An engine ready to be linked.

    Attributes:
        program: what runs.
        kernels: the kernels' object file.
        plan: the plan's C source.
        arena_bytes: bytes of the buffers and work spaces at static sizes; None: they depend on the dimensions.
        weight_bytes: bytes of the constants.
        lowered: the module that the kernels' code was generated from.
        workspaces: kernel -> bytes that it works in on one thread, beside its arguments.
    """

    program: Program
    kernels: bytes
    plan: str
    arena_bytes: int | None
    weight_bytes: int
    lowered: Any
    workspaces: Mapping[str, int]


def compile_ahead(
    module: Any,
    machine: Machine,
    inputs: Sequence[str],
    outputs: Sequence[str],
    limits: Mapping[str, tuple[int, int | None]],
) -> AheadOfTime:
    """An engine from an IRModule after the pipeline's phase ``dataflow``.

    Args:
        module: not changed.
        machine: the target.
        inputs: names in order.
        outputs: names in order.
        limits: dimension -> least and largest size (None: no limit).

    Raises:
        PlanError: the model needs TVM's virtual machine.
        Refusal: code generation failed.
    """
    program = read_program(module, inputs, outputs)
    kernels, lowered = kernels_object(module, machine)
    offsets, total = _offsets(program.weights)
    works = workspaces(lowered)
    plan, arena = plan_text(program, scalar_types(lowered), offsets, total, limits, works)
    return AheadOfTime(program, kernels, plan, arena, total, lowered, works)


def _offsets(weights: Sequence[np.ndarray]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for weight in weights:
        offsets.append(total)
        total += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


def write_weights(engine: AheadOfTime, arch: str, path: Path) -> None:
    """The constants as an object file with one symbol, ``tc_weights``, aligned to 64 bytes."""
    write_object(_weights(engine).data, arch, path, WEIGHTS, _ALIGNMENT)


def _write_wasm_weights(engine: AheadOfTime, linker: Linker, folder: Path) -> None:
    """The same as ``weights.o`` of a WebAssembly module: its objects are of another format, which LLVM writes."""
    data = _weights(engine)
    (folder / "weights.bin").write_bytes(data.data)
    lines = (
        f'.section .rodata.{WEIGHTS},"",@', f".globl {WEIGHTS}", f".type {WEIGHTS},@object", f".p2align {_ALIGN_POWER}",
        f"{WEIGHTS}:", '.incbin "weights.bin"', f".size {WEIGHTS}, {data.nbytes}",
    )  # fmt: skip
    (folder / "weights.c").write_text("".join(f"__asm__({json.dumps(line)});\n" for line in lines))
    linker.compile("weights.c", folder)


def _weights(engine: AheadOfTime) -> np.ndarray:
    import numpy as np

    offsets, total = _offsets(engine.program.weights)
    block = np.zeros(max(total, _ALIGNMENT), np.uint8)
    for offset, weight in zip(offsets, engine.program.weights, strict=True):
        flat = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
        block[offset : offset + flat.nbytes] = flat
    return block


def link_ahead(engine: AheadOfTime, linker: Linker, output: Path) -> None:
    """Writes the engine as the shared library ``output``.

    Raises:
        ToolchainError: MISSING_TOOL or COMPILE.
    """
    linker.check()
    with tempfile.TemporaryDirectory(prefix="link-", dir=output.parent) as temporary:
        folder = Path(temporary)
        objects = write_objects(engine, linker, folder)
        (folder / "exports.map").write_text("{ global: toolchain_model; local: *; };\n")
        linker.link(objects, folder, exports="exports.map", threads=True, math=False)
        if linker.arch != WASM and not _OF_LIBC.issuperset(read_elf(folder / "model.so").undefined):
            linker.link(objects, folder, exports="exports.map", threads=True)
        os.replace(folder / "model.so", output)
    linker.check_output(output)


def write_objects(engine: AheadOfTime, linker: Linker, folder: Path, *, static: bool = False) -> list[str]:
    """Compiles everything of the engine into ``folder``; returns the objects' names in it.

    ``static``: for a static executable, with musl as the C library.
    """
    (folder / "kernels.o").write_bytes(engine.kernels)
    if linker.arch == WASM:
        _write_wasm_weights(engine, linker, folder)
    else:
        write_weights(engine, linker.arch, folder / "weights.o")
    for name, content in (*_sources().items(), ("plan.c", engine.plan.encode()), *_engine(linker, static).items()):
        (folder / name).write_bytes(content)
    linker.compile("plan.c", folder, static=static)
    return ["kernels.o", "weights.o", "plan.o", *_engine(linker, static)]


@cache
def _sources() -> Mapping[str, bytes]:
    """The headers that a plan and the engine include."""
    headers = (SOURCES / "src" / "engine.h", SOURCES / "include" / "toolchain_model.h")
    return {path.name: path.read_bytes() for path in headers}


@cache
def _engine(linker: Linker, static: bool) -> Mapping[str, bytes]:
    """The objects that are the same for every model: compiled once in a process."""
    with tempfile.TemporaryDirectory(prefix="engine-") as temporary:
        folder = Path(temporary)
        for name, content in _sources().items():
            (folder / name).write_bytes(content)
        objects = {}
        for source in ENGINE_SOURCES:
            (folder / source).write_bytes((SOURCES / "src" / source).read_bytes())
            linker.compile(source, folder, static=static)
            name = source.removesuffix(".c") + ".o"
            objects[name] = (folder / name).read_bytes()
    return objects
