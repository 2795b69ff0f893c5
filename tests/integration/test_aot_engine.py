"""Engines ahead of time: what they compute, what they need, and what they answer to misuse."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm_support import X86_V3, Stages

from toolchain.native_engine import NativeEngine, NativeError
from toolchain.stages import compile_tvm
from toolchain.stages.compile_tvm import Options
from toolchain.tvm.library import Refusal
from toolchain.tvm.link import Linker
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes

OPTIONS = Options(X86_V3, "cpu", "x86_64", True, 256, 16, "cc", "2.28", "fp32", form="aot")


@pytest.fixture(scope="module")
def library(stages: Stages, digits: Path) -> Path:
    ran = stages.run(compile_tvm, OPTIONS, digits)
    assert not ran.refused
    return ran.engine / "model.so"


def build(model: onnx.ModelProto, path: Path, form: str = "aot") -> Any:
    from toolchain.tvm.forms import Interface, build_library
    from toolchain.tvm.importer import import_model

    interface = Interface([i.name for i in model.graph.input], [o.name for o in model.graph.output], {})
    machine = Machine(X86_V3, "cpu", "x86_64", 256, 16)
    return build_library(import_model(model), machine, Notes(), Linker("cc", "x86_64", ""), path, interface, form)


def model_of(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **weights: np.ndarray) -> Any:
    def info(name: str, spec: Any) -> Any:
        return helper.make_tensor_value_info(name, *spec)

    graph = helper.make_graph(
        nodes,
        "g",
        [info(n, s) for n, s in inputs.items()],
        [info(n, s) for n, s in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def reference(model: onnx.ModelProto, *arrays: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a for i, a in zip(model.graph.input, arrays, strict=True)})


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_batch_gives_what_onnxruntime_gives_with_any_number_of_threads(
    library: Path, digits: Path, threads: int
) -> None:
    engine = NativeEngine(library, threads)
    session = onnxruntime.InferenceSession(digits / "model.onnx", providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    for batch in (1, 5, 64, 2):
        image = generator.standard_normal((batch, 1, 8, 8)).astype(np.float32)
        (got,) = engine.run([image])
        (want,) = session.run(None, {engine.inputs[0].name: image})
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_engine_says_what_goes_in_and_out(library: Path) -> None:
    engine = NativeEngine(library, 1)
    assert engine.dims == ("batch",)
    assert engine.inputs[0].shape == ("batch", 1, 8, 8)
    assert engine.inputs[0].dtype == "float32"
    assert engine.outputs[0].shape == ("batch", 10)
    assert engine.weight_bytes > 0
    assert engine.arena_bytes({"batch": 8}) > engine.arena_bytes({"batch": 1}) > 0


def test_unaligned_memory_of_the_caller_makes_no_difference(library: Path) -> None:
    engine = NativeEngine(library, 1)
    image = np.random.default_rng(1).standard_normal((3, 1, 8, 8)).astype(np.float32)
    memory = np.empty(image.nbytes + 4, np.uint8)
    shifted = memory[4:].view(np.float32).reshape(image.shape)
    shifted[...] = image
    assert shifted.ctypes.data % 64 != image.ctypes.data % 64 or image.ctypes.data % 64
    np.testing.assert_array_equal(engine.run([shifted])[0], engine.run([image])[0])


def test_a_size_outside_its_range_is_refused_before_anything_runs(library: Path) -> None:
    engine = NativeEngine(library, 1)
    with pytest.raises(NativeError, match="outside its range"):
        engine.run([np.zeros((65, 1, 8, 8), np.float32)])
    assert engine.run([np.zeros((64, 1, 8, 8), np.float32)])[0].shape == (64, 10)


def test_many_threads_on_many_instances_and_on_one_get_the_right_answers(library: Path) -> None:
    shared = NativeEngine(library, 2)
    image = np.random.default_rng(2).standard_normal((4, 1, 8, 8)).astype(np.float32)
    (want,) = shared.run([image])
    wrong: list[int] = []

    def work(engine: NativeEngine) -> None:
        for _ in range(200):
            if not np.array_equal(engine.run([image])[0], want):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=(e,)) for e in (shared, shared, NativeEngine(library, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_runs_at_once_on_one_instance_are_answered_with_busy(library: Path) -> None:
    engine = NativeEngine(library, 1)
    image = np.zeros((64, 1, 8, 8), np.float32)
    model, instance = engine._model, engine._instance
    statuses: set[int] = set()

    def work() -> None:
        out = np.empty((64, 10), np.float32)
        given, taken = (ctypes.c_void_p * 1)(image.ctypes.data), (ctypes.c_void_p * 1)(out.ctypes.data)
        dims = (ctypes.c_int64 * 1)(64)
        for _ in range(2000):
            statuses.add(model.run(instance, dims, given, taken))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in statuses
    assert statuses <= {0, 3}


def test_a_process_that_ends_with_running_threads_ends_well(library: Path) -> None:
    text = f"""
import numpy as np
from pathlib import Path
from toolchain.native_engine import NativeEngine
engine = NativeEngine(Path({str(library)!r}), 4)
engine.run([np.zeros((64, 1, 8, 8), np.float32)])
import sys
assert not any(m in sys.modules for m in ("tvm", "tvm_ffi", "onnx", "torch"))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_outputs_that_are_inputs_weights_or_twice_the_same_are_copied(tmp_path: Path) -> None:
    model = model_of(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Identity", ["r"], ["again"]),
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("Identity", ["w"], ["constant"]),
            helper.make_node("Reshape", ["r", "shape"], ["flat"]),
        ],
        {"x": (TensorProto.FLOAT, [2, 6])},
        {
            "r": (TensorProto.FLOAT, [2, 6]),
            "again": (TensorProto.FLOAT, [2, 6]),
            "same": (TensorProto.FLOAT, [2, 6]),
            "constant": (TensorProto.FLOAT, [3]),
            "flat": (TensorProto.FLOAT, [12]),
        },
        w=np.array([1, 2, 3], np.float32),
        shape=np.array([12], np.int64),
    )
    build(model, tmp_path / "m.so")
    engine = NativeEngine(tmp_path / "m.so", 1)
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    for got, want in zip(engine.run([x]), reference(model, x), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.shape == want.shape


def test_weights_of_equal_value_are_held_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(8)]
    copies = {f"w{i}": weight for i in range(8)}
    model = model_of(nodes, {"v0": (TensorProto.FLOAT, [1, 64])}, {"v8": (TensorProto.FLOAT, [1, 64])}, **copies)
    build(model, tmp_path / "m.so")
    assert NativeEngine(tmp_path / "m.so", 1).weight_bytes < 1.5 * weight.nbytes


def test_kernels_with_names_of_c_functions_do_not_clash(tmp_path: Path) -> None:
    model = model_of(
        [
            helper.make_node("Exp", ["x"], ["a"]),
            helper.make_node("ReduceSum", ["a"], ["b"], keepdims=1),
            helper.make_node("Sqrt", ["b"], ["c"]),
            helper.make_node("Softmax", ["x"], ["d"]),
        ],
        {"x": (TensorProto.FLOAT, [4, 33])},
        {"c": (TensorProto.FLOAT, [1, 1]), "d": (TensorProto.FLOAT, [4, 33])},
    )
    build(model, tmp_path / "m.so")
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)
    for got, want in zip(NativeEngine(tmp_path / "m.so", 2).run([x]), reference(model, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sizes_that_depend_on_values_need_the_virtual_machine_and_the_report_says_why(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("NonZero", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, [3, 4])},
        {"y": (TensorProto.INT64, [2, "n"])},
    )
    with pytest.raises(Refusal, match="plan ahead of time"):
        build(model, tmp_path / "m.so", "aot")
    built = build(model, tmp_path / "m.so", "auto")
    assert built.name == "vm"
    assert "plan ahead of time can't hold the model" in built.because


def test_an_engine_of_another_interface_version_is_refused(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("static unsigned model[64] = {99};\nvoid *toolchain_model(void) { return model; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", source], check=True)
    with pytest.raises(NativeError, match="version 99"):
        NativeEngine(tmp_path / "other.so")


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(NativeError):
        NativeEngine(tmp_path / "text.so")


def test_the_virtual_machine_and_the_plan_compute_the_same_bytes(stages: Stages, digits: Path, library: Path) -> None:
    from toolchain.tvm.compare import open_library

    ran = stages.run(compile_tvm, replace(OPTIONS, form="vm"), digits)
    image = np.random.default_rng(3).standard_normal((7, 1, 8, 8)).astype(np.float32)
    machine, plan = open_library(ran.engine / "model.so", "vm"), open_library(library, "aot")
    np.testing.assert_array_equal(machine.run([image])[0], plan.run([image])[0])


@pytest.mark.parametrize("compiler", [["cc"], [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]])
def test_the_c_sources_compile_without_a_warning(compiler: list[str], tmp_path: Path) -> None:
    """A user's compiler may know new warnings, so builds do not ask for any."""
    edge = Path(__file__).parents[2] / "toolchain" / "runtime" / "edge"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", f"-I{edge / 'include'}"]
    for source in sorted((edge / "src").glob("*.c")):
        command = [*compiler, *flags, "-c", source, "-o", tmp_path / "one.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_kernel_whose_buffers_may_lie_anywhere_begins_at_their_start(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("ScatterND", ["x", "at", "new"], ["y"])],
        {"x": (TensorProto.FLOAT, [8, 3]), "new": (TensorProto.FLOAT, [2, 3])},
        {"y": (TensorProto.FLOAT, [8, 3])},
        at=np.array([[6], [1]], np.int64),
    )
    build(model, tmp_path / "m.so")
    x, new = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate([(8, 3), (2, 3)]))
    np.testing.assert_array_equal(NativeEngine(tmp_path / "m.so", 1).run([x, new])[0], reference(model, x, new)[0])


def test_a_dtype_that_no_interface_carries_needs_the_virtual_machine(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
        {"x": (TensorProto.FLOAT, [4])},
        {"y": (TensorProto.BFLOAT16, [4])},
    )
    built = build(model, tmp_path / "m.so", "auto")
    assert built.name == "vm"
    assert "bfloat16" in built.because


@pytest.mark.parametrize("form", ["aot", "vm"])
def test_nan_stays_nan_through_bounds(tmp_path: Path, form: str) -> None:
    from toolchain.tvm.compare import open_library

    shape = (TensorProto.FLOAT, [4, 33])
    model = model_of(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Clip", ["x", "lo", "hi"], ["z"])],
        {"x": shape},
        {"y": shape, "z": shape},
        lo=np.array(0, np.float32),
        hi=np.array(6, np.float32),
    )
    build(model, tmp_path / "m.so", form)
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32) * 5
    x[0, 3] = x[2, 32] = np.nan
    x[1, 1] = np.inf
    for got, want in zip(open_library(tmp_path / "m.so", form).run([x]), reference(model, x), strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.isnan(got).sum() == 2
