"""The edge runtime: bundles made by the packer, run through the C interface and by bundle-run."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bundle_samples, edge_samples
from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    bundle_spec,
    expected_scores,
    expected_tokens,
    requirements,
    sample_release,
)
from helpers.edge_samples import EdgeError, Runtime, compile_model, matrix_engine, selftest_file, tokens_engine
from helpers.emulated import EmulatedMachine
from helpers.emulator_packages import EmulatorError

from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.bundle.resolve import resolve
from toolchain.errors import ExitCode
from toolchain.runtime.edge.build import RunnerFiles, StaticModel, build_runner, compiler_command

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> RunnerFiles:
    return build_runner(platform.machine(), "glibc", "cc", tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module")
def runtime(built: RunnerFiles) -> Runtime:
    assert built.library is not None
    return Runtime(built.library)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        "any": matrix_engine(folder / "any"),
        "one": matrix_engine(folder / "one", 3),
        "buckets": matrix_engine(folder / "buckets", 1, 8),
        "tokens": tokens_engine(folder / "tokens", ((1, 8), (1, 16), (4, 8), (4, 16))),
        "tokens-any": tokens_engine(folder / "tokens-any", ((0, 0),)),
    }


@pytest.fixture(scope="module")
def release(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of one bundle, of any batch size and with a self-test."""
    folder = tmp_path_factory.mktemp("release")
    spec = bundle_spec(engines["any"], selftest_npz=selftest_file(folder / "selftest.npz"))
    pack_release("sample", "1.0.0", [pack_bundle(spec)], folder / "r")
    return folder / "r"


def image(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)


def refusal(runtime: Runtime, path: Path | str, **options: Any) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        runtime.open(path, **options)
    return caught.value


def packed(folder: Path, spec: BundleSpec) -> Path:
    pack_release("sample", "1.0.0", [pack_bundle(spec)], folder)
    return folder


def program(built: RunnerFiles, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(built.program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_bundle_runs_and_gives_what_the_model_gives(runtime: Runtime, release: Path) -> None:
    bundle = runtime.open(release)
    for rows in (1, 5, 64):
        (scores,) = bundle.run({"image": image(rows)}, ("scores",))
        np.testing.assert_allclose(scores, expected_scores(image(rows)), rtol=1e-5, atol=1e-6)
    assert bundle.property("form") == "aot"
    assert bundle.property("target") == "any"
    assert bundle.property("digest") == resolve(str(release)).digest
    bundle.close()


def test_the_interface_is_versioned_and_checked_when_a_bundle_is_opened(runtime: Runtime, release: Path) -> None:
    assert runtime.lib.tc_runtime_abi() == 1
    error = refusal(runtime, release, abi=2)
    assert error.status == edge_samples.USAGE
    assert "made for interface 2 of the runtime, this is 1" in error.text
    assert refusal(runtime, release, size=8).status == edge_samples.USAGE


@pytest.mark.parametrize("rows", [*range(1, 12), 17, 63, 64])
def test_batches_are_filled_up_split_and_cut(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, rows: int
) -> None:
    bundle = runtime.open(sample_release(tmp_path / "r", engines["buckets"]))
    (scores,) = bundle.run({None: image(rows)})
    np.testing.assert_allclose(scores, expected_scores(image(rows)), rtol=1e-5, atol=1e-6)
    bundle.close()


@pytest.mark.parametrize("name", ["tokens", "tokens-any"])
def test_two_dimensions_are_filled_up_split_and_cut(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(engines[name], engine)
    if name == "tokens-any":
        path = engine / "engine.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"variants": [{"file": "b0s0.so", "sizes": {}}]}))
    bundle = runtime.open(sample_release(tmp_path / "r", engine), flags=edge_samples.OPEN_ALL)
    for batch, sequence in ((1, 8), (1, 3), (2, 8), (3, 11), (4, 16), (9, 5), (33, 16)):
        generator = np.random.default_rng(batch)
        tokens = generator.standard_normal((batch, sequence, 4)).astype(np.float32)
        mask = generator.integers(0, 2, (batch, sequence)).astype(np.float32)
        pooled, states = bundle.run({"mask": mask, "tokens": tokens}, ("pooled", "states"))
        want = expected_tokens(tokens, mask)
        np.testing.assert_allclose(states, want["states"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pooled, want["pooled"], rtol=1e-5, atol=1e-6)
    bundle.close()


def test_sizes_that_no_engine_fits_are_told_with_those_that_there_are(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(engines["one"], engine)
    contract = json.loads((engine / "contract.json").read_text())
    contract["dims"]["batch"]["batch"] = False
    (engine / "contract.json").write_text(json.dumps(contract))
    bundle = runtime.open(sample_release(tmp_path / "r", engine))
    with pytest.raises(EdgeError) as caught:
        bundle.run({"image": image(2)})
    assert caught.value.status == edge_samples.BAD_INPUT
    assert "no engine of this bundle was compiled for batch=2" in caught.value.text
    assert "'image' has no pad value" in caught.value.text
    assert "it has engines for batch=3" in caught.value.text
    bundle.close()


def test_of_several_bundles_the_one_is_opened_that_python_opens(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    features = ("sse2", "avx") if platform.machine() == "x86_64" else ("fp", "asimd")
    cases: list[dict[str, Mapping[str, Any]]] = [
        {"a": requirements(), "b": requirements(features[:1]), "c": requirements(features)},
        {"a": requirements(features), "b": requirements(features[1:])},
        {"a": requirements(("no-such-feature",)), "b": requirements()},
        {"z": requirements(), "y": requirements()},
        {"a": requirements(cuda="sm_80"), "b": requirements(arch="riscv64"), "c": requirements()},
    ]
    from toolchain.host import detect_host
    from toolchain.target_detect import own_name

    if own := own_name(detect_host()):
        cases.append({"a": requirements(features), own: requirements()})
    for number, targets in enumerate(cases):
        release = sample_release(tmp_path / str(number), engines["any"], targets)
        bundle = runtime.open(release)
        assert bundle.property("target") == resolve(str(release), note=lambda text: None).target
        bundle.close()
    named = runtime.open(f"{tmp_path / '0'}@b")
    assert named.property("target") == "b"
    named.close()
    assert "it has a, b, c" in refusal(runtime, tmp_path / "0", target="d").text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "riscv64"}, "needs a processor of architecture riscv64, this machine is "),
        ({"cpu_features": ["sse2", "no_such", "nor_that"]}, "needs CPU features no_such, nor_that, which this machine"),
        ({"libc": {"name": "glibc", "min": "9.1"}}, "needs glibc 9.1 or newer, this machine has 2."),
        ({"os": "plan9"}, "needs operating system plan9, this machine runs linux"),
        ({"cuda_arch": "sm_80"}, "needs a CUDA device of architecture sm_80"),
    ],
)  # fmt: skip
def test_a_machine_that_does_not_suit_is_refused_before_anything_is_loaded(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    if "sse2" in change.get("cpu_features", ()) and platform.machine() != "x86_64":
        change = {"cpu_features": ["no_such", "nor_that"]}
    broken = tmp_path / "engine"
    shutil.copytree(engines["any"], broken)
    (broken / "b0.so").write_bytes(b"nothing that could be loaded")
    error = refusal(runtime, sample_release(tmp_path / "r", broken, {"t": requirements() | change}))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert reason in error.text
    assert "hint: " in error.text
    several = {"t": requirements() | change, "u": requirements(arch="m68k")}
    error = refusal(runtime, sample_release(tmp_path / "s", broken, several))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert "this machine can run none of its bundles" in error.text
    assert reason in error.text
    assert "m68k" in error.text


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("change", [flip, lambda data: data[:-1], lambda data: b"", lambda data: data + b"x", None])
def test_a_file_that_was_changed_cut_off_or_removed_is_named(
    runtime: Runtime, release: Path, tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    files = [p.relative_to(release) for p in release.rglob("*") if p.is_file()]
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(release, copy)
        if change is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(change((copy / file).read_bytes()))
        error = refusal(runtime, copy, flags=edge_samples.VERIFY_ALL)
        assert error.status == edge_samples.DAMAGED_BUNDLE, (file, error)
        assert copy.as_posix() in error.text
        shutil.rmtree(copy)


def test_without_verifying_all_only_what_is_used_is_hashed(runtime: Runtime, release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    selftest = resolve(str(copy)).files["selftest.npz"]
    (copy / "blobs" / "sha256" / selftest.digest[7:]).write_bytes(b"x" * selftest.size)
    bundle = runtime.open(copy)
    with pytest.raises(EdgeError, match="content has digest sha256:") as caught:
        bundle.check(bundle.lib.tc_self_test(bundle.handle, None, 0))
    assert caught.value.status == edge_samples.DAMAGED_BUNDLE
    bundle.close()


def test_what_is_no_bundle_is_told_from_a_damaged_one(runtime: Runtime, tmp_path: Path) -> None:
    assert "does not exist" in refusal(runtime, tmp_path / "nothing").text
    assert "no OCI image layout" in refusal(runtime, tmp_path).text
    assert refusal(runtime, "").status == refusal(runtime, "x" * 5000).status == edge_samples.USAGE
    (tmp_path / "index.json").symlink_to("/dev/zero")
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    assert "is not a regular file" in refusal(runtime, tmp_path).text


@pytest.mark.parametrize("file", ["bundle.json", "engine.json"])
def test_a_newer_schema_is_refused_with_its_number(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path, file: str
) -> None:
    spec = bundle_spec(engines["any"])
    if file == "bundle.json":
        spec = replace(spec, manifest=replace(spec.manifest, schema=7))
    else:
        newer = tmp_path / "engine.json"
        newer.write_text(json.dumps(json.loads((engines["any"] / file).read_text()) | {"schema": 7}))
        spec = replace(spec, files={**spec.files, file: newer})
    error = refusal(runtime, packed(tmp_path / "r", spec))
    assert error.status == edge_samples.INCOMPATIBLE_HOST
    assert "is made for schema 7" in error.text


def test_a_bundle_of_schema_1_made_by_an_earlier_version_still_runs(built: RunnerFiles) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the kept bundle is for x86_64")
    done = program(built, "self-test", ROOT / "tests" / "assets" / "edge-schema-1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


def test_a_bundle_for_another_machine_can_be_described_but_not_run(
    built: RunnerFiles, runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    release = sample_release(tmp_path / "r", engines["any"], {"far": requirements(arch="riscv64")})
    info = json.loads(program(built, "info", release).stdout)
    assert (info["target"], info["form"]) == ("far", "aot")
    onnx = sample_release(tmp_path / "onnx", bundle_samples.matrix_engine(tmp_path / "e"))
    assert json.loads(program(built, "info", onnx).stdout)["backend"] == "onnxruntime"
    bundle = runtime.open(release, flags=edge_samples.DESCRIBE)
    with pytest.raises(EdgeError, match="was opened to be described only"):
        bundle.run({None: image(2)})
    bundle.close()


def test_engines_of_another_kind_are_refused_with_what_to_do(
    runtime: Runtime, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    onnx = bundle_samples.matrix_engine(tmp_path / "onnx")
    error = refusal(runtime, sample_release(tmp_path / "r1", onnx))
    assert error.status == edge_samples.NO_ENGINE
    assert "backend onnxruntime" in error.text
    assert "in Python" in error.text
    shutil.copytree(engines["any"], tmp_path / "vm")
    path = tmp_path / "vm" / "engine.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "form"}))
    error = refusal(runtime, sample_release(tmp_path / "r2", tmp_path / "vm"))
    assert error.status == edge_samples.NO_ENGINE
    assert "form vm" in error.text


def library_of(engine: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(engine, folder / "changed")
    change(folder / "changed" / "b0.so")
    return sample_release(folder / "r", folder / "changed")


def patched(offset: int, value: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:offset] + value + data[offset + len(value) :])

    return change


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (patched(18, b"\xf3\0"), edge_samples.INCOMPATIBLE_HOST, "is compiled for riscv64 (64 bits), this machine is"),
        (patched(4, b"\1"), edge_samples.INCOMPATIBLE_HOST, "(32 bits)"),
        (patched(0, b"\0"), edge_samples.DAMAGED_BUNDLE, "is not a shared library"),
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), edge_samples.DAMAGED_BUNDLE, "is truncated"),
        (lambda p: p.write_bytes(b""), edge_samples.DAMAGED_BUNDLE, "is not a shared library"),
        (lambda p: compile_model(p, ABI=9), edge_samples.NO_ENGINE, "an engine of interface 9, this runtime takes 1"),
        (lambda p: compile_model(p, 5), edge_samples.DAMAGED_BUNDLE, "its input image is not as its contract says"),
        (lambda p: compile_model(p, SEQUENCE=0), edge_samples.DAMAGED_BUNDLE, "takes 2 inputs and gives 2 outputs"),
        (lambda p: compile_model(p, toolchain_model="other"), edge_samples.NO_ENGINE, "it has no toolchain_model"),
    ],
)  # fmt: skip
def test_a_library_that_cannot_be_this_bundles_engine_is_refused(
    runtime: Runtime,
    engines: Mapping[str, Path],
    tmp_path: Path,
    change: Callable[[Path], object],
    status: int,
    text: str,
) -> None:
    error = refusal(runtime, library_of(engines["any"], tmp_path, change))
    assert error.status == status
    assert text in error.text


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"image": image(2).astype(np.float64)}, "must have dtype float32, got float64"),
        ({"image": image(2)[0]}, "must have 2 dimensions, got 1"),
        ({"image": image(2)[:, :3]}, "axis 1 must have size 4, got 3"),
        ({"image": image(65)}, "axis 0 (batch) must have a size from 1 to 64, got 65"),
        ({"image": np.empty((0, 4), np.float32)}, "axis 0 (batch) must have a size from 1 to 64, got 0"),
        ({"picture": image(2)}, "unknown input 'picture'"),
        ({"image": image(2), None: image(2)}, "unknown input '(a further one)'"),
        ({}, "input 'image' is missing"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_the_model_takes(
    runtime: Runtime, release: Path, inputs: Mapping[str | None, np.ndarray], text: str
) -> None:
    bundle = runtime.open(release)
    with pytest.raises(EdgeError) as caught:
        bundle.run(inputs)
    assert caught.value.status == edge_samples.BAD_INPUT
    assert text in caught.value.text
    assert "the model takes image: float32[batch, 4]" in caught.value.text
    bundle.close()


def test_memory_that_is_too_small_is_told_and_not_written_past(runtime: Runtime, release: Path) -> None:
    bundle, x = runtime.open(release), image(4)
    room = np.full(12, 7, np.float32)
    given = (edge_samples.Value * 1)(edge_samples.value_of(x, "image"))
    taken = (edge_samples.Value * 1)(edge_samples.value_of(room, "scores"))
    taken[0].bytes = 47
    status = bundle.lib.tc_run(bundle.handle, given, 1, taken, 1)
    assert status == edge_samples.TOO_SMALL
    assert taken[0].bytes == 48
    assert (room == 7).all()
    given[0].bytes = 63
    with pytest.raises(EdgeError, match="must have 64 bytes for its shape, got 63"):
        bundle.check(bundle.lib.tc_run(bundle.handle, given, 1, taken, 1))
    given[0].shape[0], given[0].rank = 2**62, 2
    assert bundle.lib.tc_run(bundle.handle, given, 1, taken, 1) == edge_samples.BAD_INPUT
    assert bundle.lib.tc_run(bundle.handle, None, 1, taken, 1) == edge_samples.USAGE
    assert bundle.lib.tc_run(None, given, 1, taken, 1) == edge_samples.USAGE
    bundle.close()


def in_threads(work: Callable[[], object], count: int = 2) -> list[object]:
    results: list[object] = [None] * count
    start = threading.Barrier(count)

    def one(index: int) -> None:
        start.wait()
        try:
            results[index] = work()
        except EdgeError as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_threads_on_one_bundle_get_busy_or_wait_and_on_two_bundles_run_at_once(
    runtime: Runtime, tmp_path: Path
) -> None:
    release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "slow", SLOW_MS=200))
    bundle = runtime.open(release)
    results = in_threads(lambda: bundle.run({None: image(3)}))
    busy = [r for r in results if isinstance(r, EdgeError)]
    assert len(busy) == 1
    assert busy[0].status == edge_samples.BUSY
    assert "another thread is running it" in busy[0].text
    bundle.close()
    waiting = runtime.open(release, flags=edge_samples.WAIT)
    for result in in_threads(lambda: waiting.run({None: image(3)})):
        assert isinstance(result, list)
        np.testing.assert_allclose(result[0], expected_scores(image(3)), rtol=1e-5, atol=1e-6)
    waiting.close()

    def own() -> object:
        mine = runtime.open(release)
        try:
            return mine.run({None: image(3)})
        finally:
            mine.close()

    assert all(isinstance(result, list) for result in in_threads(own, 4))


def test_each_thread_reads_its_own_last_error(runtime: Runtime, release: Path) -> None:
    bundle = runtime.open(release, flags=edge_samples.WAIT)

    def fail(rows: int) -> str:
        with pytest.raises(EdgeError) as caught:
            bundle.run({"image": image(rows)})
        return caught.value.text

    texts = dict.fromkeys((65, 70, 75), "")
    threads = [threading.Thread(target=lambda r=rows: texts.update({r: fail(r)})) for rows in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"got {rows}" in text for rows, text in texts.items())
    text = ctypes.create_string_buffer(b"before", 16)
    assert bundle.lib.tc_last_error(bundle.handle, text, ctypes.c_size_t(16)) == 0
    assert text.value == b""
    bundle.close()


def test_a_failing_engine_and_too_little_memory_are_statuses(
    runtime: Runtime, built: RunnerFiles, tmp_path: Path
) -> None:
    bundle = runtime.open(sample_release(tmp_path / "fails", matrix_engine(tmp_path / "f", FAILS=1)))
    with pytest.raises(EdgeError, match="it failed on these inputs") as caught:
        bundle.run({None: image(3)})
    assert caught.value.status == edge_samples.FAILED
    bundle.close()
    release = sample_release(tmp_path / "large", matrix_engine(tmp_path / "l", ARENA=1 << 30))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))

    done = program(built, "bench", release, "--runs", 1, preexec_fn=limit)
    assert done.returncode == ExitCode.INCOMPATIBLE_HOST
    assert "there is not enough memory for its arena" in done.stderr
    assert program(built, "bench", release, "--runs", 1).returncode == 0


@pytest.mark.parametrize("limit", [*range(2048, 5000, 256)])
def test_with_little_memory_every_outcome_is_a_status(built: RunnerFiles, release: Path, limit: int) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit << 10, limit << 10))

    done = program(built, "self-test", release, preexec_fn=little)
    # 127: the dynamic loader itself found no memory, before the program began.
    assert done.returncode in (0, ExitCode.INCOMPATIBLE_HOST, ExitCode.DAMAGED_BUNDLE, 127), done


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


def test_bundle_run_ends_with_the_documented_exit_codes(
    built: RunnerFiles, engines: Mapping[str, Path], release: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((2, 4)))
    np.savez_compressed(tmp_path / "small.npz", image=image(2))
    cases: list[tuple[ExitCode, tuple[object, ...], str]] = [
        (ExitCode.USAGE, ("play", release), "usage: bundle-run"),
        (ExitCode.USAGE, ("run",), "usage: bundle-run"),
        (ExitCode.USAGE, ("bench", release, "--runs", "many"), "--runs: got 'many'"),
        (ExitCode.USAGE, ("run", tmp_path / "none"), "does not exist"),
        (ExitCode.USAGE, ("run", release, "--input", "image=none.npy"), "none.npy: is no file"),
        (ExitCode.BAD_INPUT, ("run", release), "input 'image' is missing"),
        (ExitCode.BAD_INPUT, ("run", release, "--input", "pixels=x"), "give it with --input"),
        (ExitCode.BAD_INPUT, ("run", release, "--input", f"image={tmp_path}/wrong.npy"), "got float64"),
        (ExitCode.BAD_INPUT, ("run", release, "--inputs", tmp_path / "small.npz"), "it is compressed"),
        (ExitCode.STORAGE, ("bench", release, "--runs", "1", "--output", "x"), ""),
    ]
    for code, arguments, text in cases[:-1]:
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
    files = build_runner(
        platform.machine(), "glibc", "cc", tmp_path, StaticModel((tmp_path / "model.o",), manifest.to_bytes())
    )
    assert files.library is None
    np.save(tmp_path / "x.npy", image(3))
    scores = json.loads(program(files, "run", "--input", f"image={tmp_path}/x.npy").stdout)["scores"]
    np.testing.assert_allclose(np.reshape(scores["values"], (3, 3)), expected_scores(image(3)), rtol=1e-5, atol=1e-6)
    assert json.loads(program(files, "info").stdout)["target"] == "any"


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
