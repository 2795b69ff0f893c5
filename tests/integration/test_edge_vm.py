"""Engines of TVM's virtual machine in the edge runtime: without Python, and with sizes that only a run tells."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edge_support import flip, native_runner, program
from helpers import vm_samples
from helpers.emulated import EmulatedMachine
from helpers.emulator_packages import EmulatorError
from helpers.shop import RECIPE, Shop
from helpers.vm_samples import X, vm_release

from toolchain.bundle.read import open_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.edge.build import EDGE, RunnerFiles, build_runner
from toolchain.runtime.edge.tvm_libraries import tvm_libraries
from toolchain.target import load_target

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the small model is compiled for x86-64")

TWO = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/integration"]
import threading
from pathlib import Path
import numpy as np
from helpers.edge_samples import DESCRIBE, TOO_SMALL, WAIT, EdgeError, Runtime, Value, value_of
import ctypes

runtime, x = Runtime(Path(sys.argv[2])), np.load(sys.argv[4])
bundle = runtime.open(sys.argv[3])
given = (Value * 1)(value_of(x, "x"))
taken = (Value * 2)(value_of(None, "z"), value_of(None, "y"))
bundle.check(bundle.lib.tc_output_shapes(bundle.handle, given, 1, taken, 2))
assert list(taken[0].shape[:2]) == list(x.shape)
assert (taken[1].bytes, taken[1].shape[0]) == (0, -(2**63)), (taken[1].bytes, taken[1].shape[0])
z, y = np.empty_like(x), np.zeros(9, np.float32)
taken[0].data, taken[0].bytes = z.ctypes.data, z.nbytes
assert bundle.lib.tc_run(bundle.handle, given, 1, taken, 2) == TOO_SMALL
assert (taken[1].bytes, taken[1].shape[0]) == (20, 5)
taken[1].data, taken[1].bytes = y.ctypes.data, 36
for _ in range(3):
    taken[1].bytes = 36
    bundle.check(bundle.lib.tc_run(bundle.handle, given, 1, taken, 2))
assert (taken[1].bytes, taken[1].shape[0]) == (20, 5)
assert y.tolist() == [7.0] * 5 + [0.0] * 4
assert np.array_equal(z, np.abs(x))
odd = np.frombuffer(b"\\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)  # aligned to nothing
taken[1].bytes = 36
bundle.check(bundle.lib.tc_run(bundle.handle, (Value * 1)(value_of(odd, "x")), 1, taken, 2))
assert np.array_equal(z, np.abs(x))

other = runtime.open(sys.argv[3], flags=WAIT)  # a second one, in threads of its own
def work():
    y, z = np.zeros(9, np.float32), np.empty_like(x)
    for _ in range(50):
        out = (Value * 2)(value_of(y, "y"), value_of(z, "z"))
        other.check(other.lib.tc_run(other.handle, given, 1, out, 2))
        assert y.sum() == 35
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
other.close()
bundle.close()
again = runtime.open(sys.argv[3])
again.close()
print("whole")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vm_samples.compiled(tmp_path_factory.mktemp("vm") / "model.so", "x86_64", "x86-64-v3", 256)


@pytest.fixture(scope="module")
def release(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vm_release(tmp_path_factory.mktemp("release"), library, "x86_64", vm_samples.installed())


@pytest.fixture(scope="module")
def built() -> RunnerFiles:
    return native_runner()


def test_a_model_whose_sizes_depend_on_values_runs_without_python(
    built: RunnerFiles, release: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "none.npy", X[:1] * 0)
    outputs = json.loads(program(built, "run", release, "--input", f"x={tmp_path}/x.npy").stdout)
    assert (outputs["y"]["shape"], outputs["y"]["values"]) == ([5], [7] * 5)
    assert outputs["z"]["values"] == np.abs(X).ravel().tolist()
    done = program(built, "run", release, "--input", f"x={tmp_path}/none.npy", "--output", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["y"].shape == (0,)
        assert arrays["z"].shape == (1, 4)


def test_what_tvm_has_in_python_alone_is_there_in_c_and_in_python_without_its_compiler(
    built: RunnerFiles, tmp_path: Path
) -> None:
    library = vm_samples.compiled(tmp_path / "model.so", "x86_64", "x86-64-v3", 256, vm_samples.where_model())
    where = vm_release(tmp_path / "r", library, "x86_64", vm_samples.installed(), vm_samples.WHERE_CONTRACT)
    done = program(built, "self-test", where)
    assert json.loads(done.stdout)["passed"] is True, done.stderr
    np.save(tmp_path / "none.npy", X * 0)
    done = program(built, "run", where, "--input", f"x={tmp_path}/none.npy")
    assert json.loads(done.stdout)["y"] == {"dtype": "int64", "shape": [2, 0], "values": []}
    code = "import sys, toolchain, numpy\nwith toolchain.load(sys.argv[1]) as m: print(m.run({'x': numpy.eye(3, 4)"
    code += ".astype('float32')})['y'].tolist())"
    command = [sys.executable, "-c", code, str(where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[[0, 1, 2], [0, 1, 2]]\n", done.stderr


def test_what_nobody_has_without_python_is_refused_when_it_is_compiled(tmp_path: Path) -> None:
    from toolchain.runtime.tvm_functions import FUNCTIONS
    from toolchain.tvm.forms import OWN_FUNCTIONS
    from toolchain.tvm.library import Refusal

    assert FUNCTIONS == OWN_FUNCTIONS
    source = (EDGE / "src" / "tvm_functions.c").read_text()
    assert all(f'{{"{name}", ' in source for name in FUNCTIONS)
    with pytest.raises(Refusal, match=r"TVM computes it in Python: relax\.run\.unique"):
        vm_samples.compiled(tmp_path / "m.so", "x86_64", "x86-64-v3", 256, vm_samples.where_model("Unique"))


def test_it_describes_tests_and_measures_itself(built: RunnerFiles, release: Path) -> None:
    info = json.loads(program(built, "info", release).stdout)
    assert (info["form"], info["outputs"][0]["shape"]) == ("vm", [None])
    assert json.loads(program(built, "self-test", release).stdout)["passed"] is True
    done = program(built, "bench", release, "--runs", "5", "--size", "batch=2")
    assert json.loads(done.stdout)["runs"] == 5, done.stderr


def test_inputs_are_checked_as_for_other_engines(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    for name, array, text in (
        ("dtype", X.astype(np.float64), "input 'x' must have dtype float32, got float64"),
        ("size", np.zeros((9, 4), np.float32), "axis 0 (batch) must have a size from 1 to 8, got 9"),
        ("rank", np.zeros(4, np.float32), "must have 2 dimensions, got 1"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        done = program(built, "run", release, "--input", f"x={tmp_path}/{name}.npy")
        assert (done.returncode, text in done.stderr) == (ExitCode.BAD_INPUT, True), done.stderr


def test_what_tvm_raises_is_a_message_and_no_crash(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 4), -3, np.float32))
    done = program(built, "run", release, "--input", f"x={tmp_path}/x.npy")
    assert done.returncode == 17, (done.returncode, done.stdout, done.stderr)
    assert "bundle-run: engine: it failed on these inputs: " in done.stderr


def test_it_takes_the_threads_that_it_is_given_or_says_why_not(built: RunnerFiles, release: Path) -> None:
    done = program(built, "bench", release, "--runs", "2", "--threads", "5")
    assert done.returncode == 0, done.stderr
    limited = {**os.environ, "TVM_NUM_THREADS": "2"}
    done = program(built, "bench", release, "--runs", "2", "--threads", "5", env=limited)
    assert done.returncode == ExitCode.USAGE, done.stdout
    assert "TVM was started with at most 2 threads in this process, got 5" in done.stderr


def test_programs_give_memory_when_a_run_told_how_much(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", TWO, tests, built.library, release, tmp_path / "x.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "whole\n", done.stderr


def test_a_bundle_without_tvms_run_time_or_with_another_one_is_refused(
    built: RunnerFiles, library: Path, release: Path, tmp_path: Path
) -> None:
    bare = vm_release(tmp_path / "bare", library, "x86_64", None)
    done = program(built, "bench", bare)
    assert done.returncode == ExitCode.MISSING_TOOL
    assert "does not carry TVM's run-time" in done.stderr
    shutil.copytree(release, tmp_path / "changed")
    (bundle,) = open_release(tmp_path / "changed").bundles
    digest = bundle.files["runtime/libtvm_runtime.so"].digest.partition(":")[2]
    blob = tmp_path / "changed" / "blobs" / "sha256" / digest
    blob.write_bytes(flip(blob.read_bytes()))
    done = program(built, "bench", tmp_path / "changed")
    assert done.returncode == ExitCode.DAMAGED_BUNDLE
    assert "runtime/libtvm_runtime.so: content has digest" in done.stderr


def test_a_process_that_holds_tvm_is_told_so(built: RunnerFiles, release: Path) -> None:
    tests = Path(__file__).parents[1]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tvm_ffi; from pathlib import Path\n"
        "from helpers.edge_samples import EdgeError, Runtime\n"
        "try: Runtime(Path(sys.argv[2])).open(sys.argv[3])\n"
        "except EdgeError as error: print(error.text)\n"
    )
    command = [sys.executable, "-c", code, str(tests), str(built.library), str(release)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "this process holds another TVM already" in done.stdout, done.stderr


def test_a_library_that_is_no_engine_of_tvm_is_refused(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "empty.so", source], check=True)
    other = vm_release(tmp_path / "other", tmp_path / "empty.so", "x86_64", vm_samples.installed())
    done = program(built, "bench", other)
    assert done.returncode == ExitCode.DAMAGED_BUNDLE
    assert "model.so: TVM cannot load it: " in done.stderr


@pytest.mark.slow
def test_a_build_for_another_machine_packs_it(tmp_path: Path) -> None:
    machine = EmulatedMachine("cortex-a53")
    try:
        root = machine.sysroot()
    except EmulatorError as error:
        pytest.skip(str(error))
    shop = Shop(tmp_path / "shop")
    vm = '[runtime]\nengines = ["tvm"]\nform = "vm"\nrunner = true\n'
    board = f'schema = 1\nname = "board"\nextends = "cortex-a53"\n{vm}tvm_packages = "{root}/site"\n'
    (shop.recipe.parent / "board.toml").write_text(board)
    text = RECIPE.replace('["x86-64-v3"]', '["board.toml"]').replace('["fp32", "int8-static"]', '["fp32"]')
    shop.recipe.write_text(text)
    code, _, errors = shop.build("--no-measure")
    assert code == 0, errors
    done = shop.call("export", "edge", shop.release, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "libstdc++.so.6" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out" / "lib").glob("libtvm*"))
    # The outputs recorded on this machine, compared on the other.
    done = machine.run(["-L", root, tmp_path / "out" / "bundle-run", "self-test", tmp_path / "out" / "bundle"])
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr


def test_packages_of_another_version_or_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"there is no apache-tvm-ffi .* in ") as caught:
        tvm_libraries("aarch64", tmp_path)
    assert "pip install --no-deps --only-binary=:all: --target FOLDER" in caught.value.hint
    with pytest.raises(ToolchainError, match=r"libtvm_ffi\.so is no library for aarch64"):
        tvm_libraries("aarch64", vm_samples.installed())
    assert tvm_libraries("aarch64", None) == {}
    assert set(tvm_libraries("x86_64", None)) == {"libtvm_ffi.so", "libtvm_runtime.so"}
    profile = tmp_path / "board.toml"
    profile.write_text('schema = 1\nname = "board"\nextends = "cortex-a53"\n[runtime]\ntvm_packages = "tvm"\n')
    loaded = load_target(profile)
    assert loaded.tvm_packages == tmp_path / "tvm"
    assert "tvm_packages" not in loaded.to_json()["runtime"]


@pytest.mark.slow
def test_it_runs_on_an_emulated_device(tmp_path: Path) -> None:
    machine = EmulatedMachine("cortex-a53")
    try:
        root = machine.sysroot()
    except EmulatorError as error:
        pytest.skip(str(error))
    library = vm_samples.compiled(tmp_path / "model.so", "aarch64", "cortex-a53", 128)
    release = vm_release(tmp_path / "release", library, "aarch64", root / "site")
    files = build_runner("aarch64", "glibc:2.28", "zig", tmp_path / "out")
    np.save(tmp_path / "x.npy", X)
    assert machine.run(["-L", root, files.program, "self-test", release]).returncode == 0
    done = machine.run(["-L", root, files.program, "run", release, "--input", f"x={tmp_path}/x.npy"])
    assert json.loads(done.stdout)["y"]["values"] == [7] * 5, done.stderr
    libraries = [root / "site" / place for place in vm_samples.LIBRARIES.values()]
    assert files.library is not None
    # The goal for everything that a device needs beside the engine.
    assert sum(path.stat().st_size for path in (*libraries, files.library)) <= 5_500_000
