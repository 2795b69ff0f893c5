"""What engines ahead of time take of memory: inputs in the arena, planned work spaces, no library for nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edge_support import packed, program
from helpers import edge_samples
from helpers.bundle_samples import bundle_spec
from helpers.edge_samples import Runtime, aot_engine, compile_model, value_of
from onnx import TensorProto, helper
from test_aot_engine import build, model_of, reference
from tvm_support import X86_V3, cortex

from toolchain.native_engine import NativeEngine
from toolchain.runtime.edge.build import RunnerFiles
from toolchain.tvm.elf import read_elf
from toolchain.tvm.forms import Interface, build_library
from toolchain.tvm.importer import import_model
from toolchain.tvm.link import Linker
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes

SHAPE = (1, 16, 32, 32)
RISCV = {
    "kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64",
    "mattr": ["+m", "+a", "+f", "+d", "+c"], "mabi": "lp64d",
}  # fmt: skip
CONTRACT = {
    "schema": 1,
    "inputs": [{"name": "image", "dtype": "float32", "shape": list(SHAPE), "pad": None}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 8, 16, 16]}],
    "dims": {},
    "preprocessing": "",
}


def convolutions() -> onnx.ModelProto:
    """16 channels to 64, filtered one by one, to 8: the middle is larger than the input."""
    generator = np.random.default_rng(7)

    def weights(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) / 8).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["image", "a"], ["wide"]),
        helper.make_node("Conv", ["wide", "b"], ["small"], group=64, pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["small", "c"], ["y"]),
    ]
    return model_of(
        nodes,
        {"image": (TensorProto.FLOAT, SHAPE)},
        {"y": (TensorProto.FLOAT, (1, 8, 16, 16))},
        a=weights(64, 16, 1, 1), b=weights(64, 1, 3, 3), c=weights(8, 64, 1, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("form")
    return build(convolutions(), folder / "model.so"), folder / "model.so"


@pytest.fixture(scope="module")
def release(form: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    engine = aot_engine(folder / "engine", CONTRACT, {"model.so": {}})
    (engine / "model.so").write_bytes(form[1].read_bytes())
    return packed(folder / "r", bundle_spec(engine))


def lent(runtime: Runtime, bundle: edge_samples.Bundle, index: int = 0) -> tuple[int | None, int]:
    runtime.lib.tc_input_memory.restype = ctypes.c_void_p
    size = ctypes.c_size_t(99)
    return runtime.lib.tc_input_memory(bundle.handle, index, ctypes.byref(size)), size.value


def test_an_input_in_the_engines_own_memory_gives_the_same_outputs(runtime: Runtime, release: Path) -> None:
    bundle = runtime.open(release)
    image = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    (want,) = bundle.run({"image": image})
    np.testing.assert_allclose(want, reference(convolutions(), image)[0], rtol=1e-4, atol=1e-4)
    address, size = lent(runtime, bundle)
    assert address is not None
    assert size == image.nbytes
    inside = np.frombuffer((ctypes.c_char * size).from_address(address), np.float32).reshape(SHAPE)
    output = np.empty_like(want)
    for _ in range(2):
        inside[...] = image
        given, taken = value_of(inside, "image"), value_of(output, "y")
        bundle.check(runtime.lib.tc_run(bundle.handle, ctypes.byref(given), 1, ctypes.byref(taken), 1))
        np.testing.assert_array_equal(output, want)
    assert not np.array_equal(inside, image), "the arena lay elsewhere: the input took memory of its own"
    assert lent(runtime, bundle, 1) == (None, 0)
    bundle.close()


def test_engines_of_several_or_dynamic_sizes_and_of_the_first_interface_lend_nothing(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    for name in ("any", "buckets", "one"):
        bundle = runtime.open(packed(tmp_path / name, bundle_spec(engines[name])))
        assert lent(runtime, bundle) == (None, 0), name
        bundle.close()
    first = edge_samples.matrix_engine(tmp_path / "first", ABI=1)
    bundle = runtime.open(packed(tmp_path / "r1", bundle_spec(first)))
    image = np.ones((2, 4), np.float32)
    assert bundle.run({"image": image})[0].shape == (2, 3)
    assert lent(runtime, bundle) == (None, 0)
    bundle.close()
    assert NativeEngine(compile_model(tmp_path / "first.so", ABI=1), 1).run([image])[0].shape == (2, 3)


def test_the_arena_holds_the_work_spaces_and_no_more_than_the_busiest_step(form: tuple[Any, Path]) -> None:
    engine = form[0].engine
    assert engine.workspaces, "no kernel needs room for padding: the model tests nothing"
    busiest = max(
        sum(int(b.size) for b in engine.program.buffers if b.first <= step <= b.last)
        + engine.workspaces.get(call.kernel, 0)
        for step, call in enumerate(engine.program.calls)
    )
    assert busiest <= form[0].arena_bytes <= 1.05 * busiest


def test_the_process_takes_little_more_than_weights_and_arena(built: RunnerFiles, release: Path) -> None:
    import json

    done = program(built, "bench", release, "--runs", "3", "--threads", "1")
    figures = json.loads(done.stdout)
    status = json.loads(program(built, "bench", release, "--runs", "30", "--threads", "1").stdout)
    # The larger bound is for the C library and the code; inputs of 64 KiB and work spaces are not on top of it.
    assert figures["peak_kb"] * 1024 < figures["weight_bytes"] + figures["arena_bytes"] + 3_000_000
    assert status["peak_kb"] - figures["peak_kb"] < 200, "memory grows with runs"


@pytest.mark.parametrize(("operator", "loads"), [("Relu", False), ("Tan", True)])
def test_libm_is_loaded_by_engines_that_call_it_alone(tmp_path: Path, operator: str, loads: bool) -> None:
    spec = (TensorProto.FLOAT, (4, 8))
    model = model_of([helper.make_node(operator, ["x"], ["y"])], {"x": spec}, {"y": spec})
    build(model, tmp_path / "m.so")
    info = read_elf(tmp_path / "m.so")
    assert ("libm.so.6" in info.needed) == loads, info
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
    np.testing.assert_allclose(NativeEngine(tmp_path / "m.so", 1).run([x])[0], reference(model, x)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("arch", "target", "linker"),
    [
        ("x86_64", X86_V3, "zig"),
        ("aarch64", cortex("cortex-a53", "+neon"), "zig"),
        ("riscv64", {**RISCV, "num-cores": 4}, "zig-cc"),
    ],
    ids=["x86_64", "aarch64", "riscv64"],
)
def test_what_the_shipped_linkers_make_loads_no_libm_either(
    tmp_path: Path, arch: str, target: dict[str, Any], linker: str
) -> None:
    interface, machine = Interface(["image"], ["y"], {}), Machine(target, "cpu", arch, 128, 16)
    link = Linker(linker, arch, "2.31")
    build_library(import_model(convolutions()), machine, Notes(), link, tmp_path / "m.so", interface, "aot")
    assert "libm.so.6" not in read_elf(tmp_path / "m.so").needed


def test_the_runtime_needs_no_libm(built: RunnerFiles) -> None:
    assert built.library is not None
    for path in (built.library, built.program):
        assert not [name for name in read_elf(path).needed if name.startswith("libm.")], path
