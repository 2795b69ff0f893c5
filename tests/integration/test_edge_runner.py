"""bundle-run, builds of the edge runtime for every architecture, the examples, and the fuzzer."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from edge_support import (
    ROOT,
    image,
    packed,
    program,
)
from helpers import edge_samples
from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    bundle_spec,
    expected_scores,
    requirements,
)
from helpers.edge_samples import compile_model, selftest_file
from helpers.emulated import EmulatedMachine
from helpers.emulator_packages import EmulatorError

from toolchain.errors import ExitCode
from toolchain.runtime.edge.build import RunnerFiles, StaticModel, build_runner, compiler_command

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def test_bundle_run_describes_runs_tests_and_measures(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    info = json.loads(program(built, "info", release).stdout)
    assert info["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 4]}]
    assert info["dims"] == {"batch": {"min": 1, "max": 64, "batch": True}}
    assert info["digest"].startswith("sha256:")
    np.save(tmp_path / "x.npy", image(3))
    image(3).tofile(tmp_path / "x.bin")
    np.savez(tmp_path / "x.npz", image=image(3))
    want = expected_scores(image(3))
    for arguments in (
        ("--input", f"image={tmp_path}/x.npy"),
        ("--input", f"image={tmp_path}/x.bin", "--size", "batch=3"),
        ("--inputs", f"{tmp_path}/x.npz"),
    ):
        scores = json.loads(program(built, "run", release, *arguments).stdout)["scores"]
        assert scores["dtype"] == "float32"
        assert scores["shape"] == [3, 3]
        np.testing.assert_allclose(np.reshape(scores["values"], (3, 3)), want, rtol=1e-5, atol=1e-6)
    outputs = ("--output", tmp_path / "y.npz", "--output", f"scores={tmp_path}/y.npy")
    done = program(built, "run", release, "--inputs", tmp_path / "x.npz", *outputs)
    assert (done.returncode, done.stdout) == (0, "")
    for y in (np.load(tmp_path / "y.npz")["scores"], np.load(tmp_path / "y.npy")):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    tested = json.loads(program(built, "self-test", release).stdout)
    assert tested["passed"] is True
    assert tested["outputs"]["scores"]["max_abs_error"] < 1e-5
    measured = json.loads(program(built, "bench", release, "--runs", 20, "--size", "batch=8", "--threads", 1).stdout)
    assert measured["runs"] == 20
    assert 0 < measured["min_ms"] <= measured["median_ms"] <= measured["p95_ms"]
    assert measured["load_ms"] < 500
    assert 500 < measured["peak_kb"] < 10_000
    assert (measured["weight_bytes"], measured["arena_bytes"]) == (0, 16)  # as edge_model.c has it


def test_bundle_run_ends_with_the_documented_exit_codes(
    built: RunnerFiles, engines: Mapping[str, Path], release: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((2, 4)))
    np.savez_compressed(tmp_path / "small.npz", image=image(2))
    np.save(tmp_path / "good.npy", image(2))
    good = ("--input", f"image={tmp_path}/good.npy")
    cases: list[tuple[ExitCode, tuple[object, ...], str]] = [
        (ExitCode.USAGE, ("play", release), "usage: bundle-run"),
        (ExitCode.USAGE, ("run",), "usage: bundle-run"),
        (ExitCode.USAGE, ("bench", release, "--runs", "many"), "--runs: got 'many'"),
        (ExitCode.USAGE, ("run", tmp_path / "none"), "does not exist"),
        (ExitCode.USAGE, ("run", release, "--input", "image=none.npy"), "none.npy: is no file"),
        (ExitCode.BAD_INPUT, ("run", release), "input 'image' is missing"),
        (ExitCode.BAD_INPUT, ("run", release, "--input", "pixels=x"), "the model has no input 'pixels'"),
        (ExitCode.BAD_INPUT, ("run", release, "--input", f"image={tmp_path}/wrong.npy"), "got float64"),
        (ExitCode.BAD_INPUT, ("run", release, "--inputs", tmp_path / "small.npz"), "it is compressed"),
        (ExitCode.STORAGE, ("run", release, *good, "--output", tmp_path / "none" / "y.npz"), "cannot be written"),
    ]
    for code, arguments, text in cases:
        done = program(built, *arguments)
        assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
        assert text in done.stderr
    bad = bundle_spec(engines["any"], selftest_npz=selftest_file(tmp_path / "selftest.npz", error=0.1))
    done = program(built, "self-test", packed(tmp_path / "bad", bad))
    assert done.returncode == ExitCode.GATE_FIDELITY
    assert json.loads(done.stdout)["passed"] is False
    assert "largest error 0.1, allowed 0.0001" in done.stderr


def test_a_static_executable_holds_its_model(engines: Mapping[str, Path], tmp_path: Path) -> None:
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-O1", "-c", "-DBATCH=0", "-I", str(edge_samples.EDGE / "include")]
    subprocess.run([*command, str(edge_samples.SOURCES), "-o", str(tmp_path / "model.o")], check=True)
    manifest = bundle_spec(engines["any"]).manifest
    recorded = selftest_file(tmp_path / "selftest.npz").read_bytes()
    files = build_runner(
        platform.machine(), "glibc", "cc", tmp_path, StaticModel((tmp_path / "model.o",), manifest.to_bytes(), recorded)
    )
    assert files.library is None
    np.save(tmp_path / "x.npy", image(3))
    scores = json.loads(program(files, "run", "--input", f"image={tmp_path}/x.npy").stdout)["scores"]
    np.testing.assert_allclose(np.reshape(scores["values"], (3, 3)), expected_scores(image(3)), rtol=1e-5, atol=1e-6)
    assert json.loads(program(files, "info").stdout)["target"] == "any"
    assert json.loads(program(files, "self-test").stdout)["passed"] is True


def test_the_runtime_is_small_and_the_same_in_every_build(built: RunnerFiles, tmp_path: Path) -> None:
    assert all(size <= 100_000 for size in built.sizes.values())
    again = build_runner(platform.machine(), "glibc", "cc", tmp_path / "a folder of another name")
    assert built.library is not None
    assert again.library is not None
    assert again.library.read_bytes() == built.library.read_bytes()
    assert again.program.read_bytes() == built.program.read_bytes()


def test_the_library_exports_its_interface_alone(built: RunnerFiles) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", str(built.library)], capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    header = (edge_samples.EDGE / "include" / "toolchain_runtime.h").read_text()
    header = re.sub(r"#ifdef __wasm__.*?#endif", "", header, flags=re.DOTALL)
    assert names == set(re.findall(r"^TC_API [a-z0-9_ *]*?(tc_\w+)\(", header, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "machine"), [("x86_64", 62), ("aarch64", 183), ("armv7l", 40), ("riscv64", 243)])
def test_zig_builds_it_for_every_architecture(tmp_path: Path, arch: str, machine: int) -> None:
    files = build_runner(arch, "glibc:2.31", "zig", tmp_path)
    assert all(size <= 100_000 for size in files.sizes.values()), files.sizes
    for path in (files.library, files.program):
        assert path is not None
        assert int.from_bytes(path.read_bytes()[18:20], "little") == machine


def test_the_c_example_compiles_and_runs(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    example = tmp_path / "c"
    shutil.copytree(ROOT / "examples" / "c", example)
    folder = built.program.parent
    subprocess.run(["make", "-s", "-C", str(example), f"RUNTIME={folder}"], check=True, capture_output=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([str(example / "classify"), str(release)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "image: 2 dimensions" in done.stdout
    assert "scores:" in done.stdout
    done = subprocess.run([str(example / "classify"), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == ExitCode.USAGE
    assert "no OCI image layout" in done.stderr


@pytest.mark.skipif(shutil.which("rustc") is None, reason="no Rust compiler")
def test_the_rust_example_compiles_and_runs(built: RunnerFiles, release: Path, tmp_path: Path) -> None:
    folder = built.program.parent
    source = ROOT / "examples" / "rust" / "classify.rs"
    command = ["rustc", "-O", "-L", str(folder), "-o", str(tmp_path / "classify"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([str(tmp_path / "classify"), str(release)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "scores: [1, 3]" in done.stdout
    done = subprocess.run([str(tmp_path / "classify"), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == ExitCode.USAGE
    assert "no OCI image layout" in done.stderr


def aarch64_release(folder: Path, features: tuple[str, ...]) -> Path:
    engine = folder / "engine"
    engine.mkdir(parents=True)
    compiler = ("aarch64", "glibc:2.28", "zig")
    compile_model(engine / "b1.so", 1, tuple(compiler_command(*compiler)))
    compile_model(engine / "b8.so", 8, tuple(compiler_command(*compiler)))
    edge_samples.aot_engine(engine, MATRIX_CONTRACT, {"b1.so": {"batch": 1}, "b8.so": {"batch": 8}})
    recorded = selftest_file(folder / "selftest.npz")
    return packed(folder / "r", bundle_spec(engine, "device", requirements(features, "aarch64"), selftest_npz=recorded))


@pytest.mark.slow
def test_an_arm_bundle_runs_on_an_emulated_device_and_is_refused_by_one_that_lacks_a_feature(tmp_path: Path) -> None:
    try:
        small, large = (EmulatedMachine(cpu) for cpu in ("cortex-a53", "cortex-a76"))
        root = small.sysroot()
        large.sysroot()
    except EmulatorError as error:
        pytest.skip(str(error))
    device = build_runner("aarch64", "glibc:2.28", "zig", tmp_path / "device").program
    for_all = aarch64_release(tmp_path / "all", ("asimd",))
    for_large = aarch64_release(tmp_path / "large", ("asimd", "asimddp"))

    def run(machine: EmulatedMachine, *arguments: object) -> subprocess.CompletedProcess[str]:
        return machine.run(["-L", machine.sysroot(), device, *map(str, arguments)])

    assert root.exists()
    for machine, release in ((small, for_all), (large, for_all), (large, for_large)):
        done = run(machine, "self-test", release)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["passed"] is True
    done = run(small, "self-test", for_large)
    assert done.returncode == ExitCode.INCOMPATIBLE_HOST
    assert "needs CPU features asimddp, which this machine (cortex-a53) lacks" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, whose sanitizers and coverage the fuzzer uses")
def test_a_short_run_of_the_fuzzer_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fuzz"))
    import edge

    report = edge.run(tmp_path, 10)
    # It gets far into the code: with the corpus alone it reaches more than this.
    assert report["executions"] > report["seeds"]
    assert report["covered"] > 1000


@pytest.mark.slow
def test_a_static_executable_runs_on_an_emulated_32_bit_device(tmp_path: Path) -> None:
    machine = EmulatedMachine("cortex-a7", "arm")
    command = [*compiler_command("armv7l", "musl", "zig"), "-std=c11", "-D_GNU_SOURCE", "-O1", "-DBATCH=2"]
    command += [f"-I{edge_samples.EDGE / 'include'}", "-c", str(edge_samples.SOURCES), "-o", str(tmp_path / "model.o")]
    subprocess.run(command, check=True)
    engine = edge_samples.aot_engine(tmp_path / "engine", MATRIX_CONTRACT, {"model.so": {"batch": 2}})
    (engine / "model.so").write_bytes(b"in the executable")
    manifest = bundle_spec(engine, "board", requirements(("neon",), "armv7l")).manifest
    recorded = selftest_file(tmp_path / "selftest.npz").read_bytes()
    model = StaticModel((tmp_path / "model.o",), manifest.to_bytes(), recorded)
    files = build_runner("armv7l", "musl", "zig", tmp_path / "out", model)
    try:
        done = machine.run([files.program, "self-test"])
    except EmulatorError as error:
        pytest.skip(str(error))
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr
