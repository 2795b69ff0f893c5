"""WebAssembly modules of the edge runtime, run by wasmtime; the model is a small one in C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from edge_support import image
from helpers import edge_samples, wasm
from helpers.bundle_samples import MATRIX_CONTRACT, bundle_spec, expected_scores, requirements
from onnx import helper, numpy_helper

from toolchain.bundle.manifest import BundleManifest
from toolchain.errors import ExitCode, ToolchainError
from toolchain.programs import emulator_program, program_version
from toolchain.runtime.edge.build import StaticModel, build_runner, compile_static, compiler_command
from toolchain.stage import StageContext
from toolchain.stages import link_static
from toolchain.target import load_target

FEATURES = ("simd128",)


def manifest_of(folder: Path) -> BundleManifest:
    engine = edge_samples.aot_engine(folder, MATRIX_CONTRACT, {"model.wasm": {}})
    (engine / "model.wasm").write_bytes(b"in the module")
    needs = requirements(FEATURES, "wasm32") | {"os": "wasi", "libc": None}
    return bundle_spec(engine, "module", needs).manifest


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The runtime's objects, and the model's."""
    folder = tmp_path_factory.mktemp("wasm")
    compile_static("wasm32", folder / "runtime")
    command = [*compiler_command("wasm32", "wasi", "zig"), "-std=c11", "-D_GNU_SOURCE", "-O1", "-DBATCH=0"]
    command += [f"-I{edge_samples.EDGE / 'include'}", "-c", str(edge_samples.SOURCES), "-o", str(folder / "model.o")]
    subprocess.run(command, check=True)
    return folder / "runtime", folder / "model.o"


def module_of(parts: tuple[Path, Path], folder: Path, error: float = 0.0) -> Path:
    runtime, model = parts
    recorded = edge_samples.selftest_file(folder / "selftest.npz", error).read_bytes()
    manifest = manifest_of(folder / "engine").to_bytes()
    files = build_runner("wasm32", "wasi", "zig", folder / "out", StaticModel((model,), manifest, recorded, runtime))
    assert files.library is None
    return files.program


@pytest.fixture(scope="module")
def module(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return module_of(parts, tmp_path_factory.mktemp("module"))


def test_a_module_is_a_command_that_sees_the_files_it_is_given(module: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    np.save(tmp_path / "open" / "x.npy", image(3))
    np.save(tmp_path / "x.npy", image(3))
    done = wasm.run(module, "run", "--input", "image=x.npy", "--output", "y.npz", cwd=tmp_path / "open")
    assert done.returncode == 0, done.stderr
    scores = np.load(tmp_path / "open" / "y.npz")["scores"]
    np.testing.assert_allclose(scores, expected_scores(image(3)), rtol=1e-5, atol=1e-6)
    outside = wasm.run(module, "run", "--input", "image=../x.npy", cwd=tmp_path / "open")
    assert outside.returncode == ExitCode.STORAGE, outside.stdout
    assert "../x.npy: cannot be read" in outside.stderr
    assert wasm.run(module, "run", "--input", "image=none.npy", cwd=tmp_path).returncode == ExitCode.USAGE


def test_a_module_describes_tests_and_measures_itself(module: Path) -> None:
    assert json.loads(wasm.run(module, "info").stdout)["target"] == "module"
    assert json.loads(wasm.run(module, "self-test").stdout)["passed"] is True
    report = json.loads(wasm.run(module, "bench", "--runs", "5").stdout)
    assert report["runs"] == 5
    assert report["peak_kb"] >= 1024  # its stack


def test_a_module_says_what_is_wrong_as_elsewhere(parts: tuple[Path, Path], module: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", image(3).astype(np.float64))
    done = wasm.run(module, "run", "--input", "image=x.npy", cwd=tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "float64" in done.stderr
    done = wasm.run(module_of(parts, tmp_path, error=0.1), "self-test")
    assert done.returncode == ExitCode.GATE_FIDELITY
    assert "largest error 0.1" in done.stderr


def test_a_module_for_another_machine_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    runtime, model = parts
    manifest = bundle_spec(edge_samples.matrix_engine(tmp_path / "engine"), "pc", requirements(("avx2",), "x86_64"))
    static = StaticModel((model,), manifest.manifest.to_bytes(), b"", runtime)
    done = wasm.run(build_runner("wasm32", "wasi", "zig", tmp_path / "out", static).program, "bench")
    assert done.returncode == ExitCode.INCOMPATIBLE_HOST
    assert "needs operating system linux, this machine runs wasi" in done.stderr


def test_a_program_calls_the_functions_of_a_module(module: Path) -> None:
    embedded = wasm.Embedded(module)
    assert embedded.open() == (edge_samples.OK, "")
    for rows in (1, 3):
        status, scores = embedded.run("image", image(rows))
        assert status == edge_samples.OK
        np.testing.assert_allclose(scores, expected_scores(image(rows)), rtol=1e-5, atol=1e-6)
    assert embedded.call("tc_self_test", embedded.bundle, 0, 0) == edge_samples.OK
    status, _ = embedded.run("pixels", image(3))
    assert status == edge_samples.BAD_INPUT
    assert "pixels" in embedded.last_error()
    embedded.call("tc_close", embedded.bundle)
    status, why = embedded.open(abi=7)
    assert status == edge_samples.USAGE
    assert "made for interface 7" in why


def test_a_module_exports_the_interface_and_its_memory(module: Path) -> None:
    names = set(wasm.Embedded(module).exports)
    assert {"_start", "memory", "malloc", "free", "toolchain_model", "tc_open_module", "tc_run"} <= names
    assert "tc_open" not in names
    assert module.stat().st_size < 160_000


def test_a_module_has_the_same_bytes_in_every_build(parts: tuple[Path, Path], module: Path, tmp_path: Path) -> None:
    assert module_of(parts, tmp_path).read_bytes() == module.read_bytes()


def test_an_engine_by_tvm_is_checked_in_wasmtime(tmp_path: Path) -> None:
    from toolchain.tvm.aot.library import compile_ahead
    from toolchain.tvm.emulated import EmulatedLibrary
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.link import Linker
    from toolchain.tvm.machine import Machine
    from toolchain.tvm.pipeline import Notes, prepare_module

    generator = np.random.default_rng(2)
    weight, image_ = (generator.standard_normal(s).astype(np.float32) for s in ((8, 3, 3, 3), (2, 3, 9, 9)))
    model = convolution(weight)
    profile = load_target("wasm32-wasi")
    machine = Machine(profile.tvm_target(), "cpu", "wasm32", 128, profile.cpu.registers, 32)
    module = prepare_module(import_model(model), machine, Notes(), None).module
    engine = compile_ahead(module, machine, ["x"], ["y"], {"batch": (1, 4)})
    emulator = emulated(tmp_path)
    library = EmulatedLibrary(engine, Linker("zig-cc", "wasm32", "0.1"), (str(emulator),))
    (got,) = library.run([image_])
    library.close()
    (want,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": image_})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def convolution(weight: np.ndarray) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Sigmoid", ["c"], ["y"])]
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("x", (3, 9, 9)), ("y", (8, 7, 7)))
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def emulated(folder: Path) -> Path:
    (folder / "bin").mkdir()
    return wasm.wasmtime_program(folder / "bin")


@pytest.mark.parametrize("error", [0.0, 0.5], ids=["right", "wrong"])
def test_a_module_passes_its_self_test_in_wasmtime_before_it_is_released(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    monkeypatch.setenv("PATH", f"{emulated(tmp_path).parent}:{os.environ['PATH']}")
    program = emulator_program("wasm32", "")
    assert (program, program_version(program)) == ("wasmtime", f"wasmtime {version('wasmtime')}")
    folders = {name: tmp_path / name for name in ("engine", "objects", "verdict", "selftest")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copy(parts[1], folders["objects"])
    manifest_of(folders["engine"])
    (folders["verdict"] / "verdict.json").write_text('{"worst": {"cosine": 1.0, "max_abs_error": 1e-6}}')
    edge_samples.selftest_file(folders["selftest"] / "selftest.npz", error)
    needs = dict(requirements(FEATURES, "wasm32") | {"os": "wasi", "libc": None})
    options = link_static.Options("wasm32", "m", "1.0.0", "", "module", {}, needs, program)
    (tmp_path / "out").mkdir()
    context = StageContext({**folders, "runtime": parts[0]}, options, tmp_path / "out", tmp_path)
    if error:
        with pytest.raises(ToolchainError, match=r"fails its self-test \(emulated by wasmtime\)"):
            link_static.run(context)
    else:
        assert link_static.run(context).facts["checked"] == "emulated by wasmtime"
        assert (tmp_path / "out" / "engine" / "model.wasm").read_bytes()[:4] == b"\0asm"


def test_modules_are_made_by_zig_with_its_c_library() -> None:
    for libc, compiler in (("musl", "zig"), ("wasi", "cc")):
        with pytest.raises(ToolchainError, match="built by zig with the C library wasi"):
            compiler_command("wasm32", libc, compiler)
    with pytest.raises(ToolchainError, match="allowed: glibc, glibc:VERSION, musl"):
        compiler_command("x86_64", "wasi", "zig")
