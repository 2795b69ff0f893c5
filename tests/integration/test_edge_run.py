"""Running bundles with the edge runtime through its C interface."""

from __future__ import annotations

import ctypes
import json
import platform
import resource
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from edge_support import (
    image,
    in_threads,
    program,
)
from helpers import edge_samples
from helpers.bundle_samples import (
    expected_scores,
    expected_tokens,
    sample_release,
)
from helpers.edge_samples import EdgeError, Runtime, matrix_engine
from tvm_support import Stages, digits_cnn, stages

from toolchain.bundle.resolve import resolve
from toolchain.errors import ExitCode
from toolchain.runtime.edge.build import RunnerFiles
from toolchain.stages import compile_tvm

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def test_a_bundle_runs_and_gives_what_the_model_gives(runtime: Runtime, release: Path) -> None:
    bundle = runtime.open(release)
    for rows in (1, 5, 64):
        (scores,) = bundle.run({"image": image(rows)}, ("scores",))
        np.testing.assert_allclose(scores, expected_scores(image(rows)), rtol=1e-5, atol=1e-6)
    assert bundle.property("form") == "aot"
    assert bundle.property("target") == "any"
    assert bundle.property("digest") == resolve(str(release)).digest
    bundle.close()


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
    bundle = runtime.open(sample_release(tmp_path / "r", engines[name]), flags=edge_samples.OPEN_ALL)
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


@pytest.mark.parametrize(("dtype", "outside"), [("int8", -1), ("int32", 100), ("int64", 2**40), ("uint64", 2**64 - 1)])
def test_whole_numbers_outside_of_the_declared_range_are_refused(
    runtime: Runtime, tmp_path: Path, dtype: str, outside: int
) -> None:
    ids = {"name": "image", "dtype": dtype, "shape": ["batch", 4], "pad": None, "low": 0, "high": 99}
    engine = matrix_engine(tmp_path / "engine", IMAGE=f"TC_{dtype.upper()}")
    contract = json.loads((engine / "contract.json").read_text())
    (engine / "contract.json").write_text(json.dumps(contract | {"inputs": [ids]}))
    bundle = runtime.open(sample_release(tmp_path / "r", engine))
    given = np.array([[0, 99, 5, 7], [1, 2, 3, 4]], dtype)
    if given.itemsize >= 4:  # The sample takes whatever bits it gets for floats.
        bundle.run({"image": given})
    given[1, 2] = outside
    with pytest.raises(EdgeError) as caught:
        bundle.run({"image": given})
    assert caught.value.status == edge_samples.BAD_INPUT
    got = min(outside, 2**63 - 1)
    assert f"input 'image' must hold values from 0 to 99, got {got} at element 6" in caught.value.text
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


@pytest.fixture(scope="module")
def compile_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    yield from stages(tmp_path_factory.mktemp("stages"))


def test_an_engine_that_was_compiled_ahead_of_time_runs_at_any_batch_size(
    runtime: Runtime, compile_stages: Stages, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if platform.machine() != "x86_64":
        pytest.skip("compiles for x86-64")
    model = digits_cnn(tmp_path / "onnx")
    target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2", "num-cores": 2}
    options = compile_tvm.Options(target, "cpu", "x86_64", True, 128, 16, "cc", "", "fp32", form="aot")
    ran = compile_stages.run(compile_tvm, options, model)
    assert (ran.refused, ran.error) == ("", None)
    bundle = runtime.open(sample_release(tmp_path / "r", ran.engine), flags=edge_samples.WAIT)
    session = onnxruntime.InferenceSession(str(model / "model.onnx"))
    for batch in (1, 64, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 1, 8, 8)).astype(np.float32)
        (want,) = session.run(None, {"x": x})
        np.testing.assert_allclose(bundle.run({"x": x})[0], want, rtol=1e-4, atol=1e-6)
    for result in in_threads(lambda: bundle.run({"x": x})[0], 3):
        np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-6)
    bundle.close()
