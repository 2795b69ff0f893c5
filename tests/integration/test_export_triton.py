"""Exported model repositories in a real Triton: it loads them, and answers what our own server answers."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bundle_samples import expected_scores
from helpers.export_samples import aot_release, exported, onnx_release, tokens_release, tvm_release
from helpers.triton_server import Triton, TritonMissingError, triton_folder, triton_serving

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
pytest.importorskip("httptools")
from tritonclient.utils import InferenceServerException, triton_to_np_dtype  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("triton")]
SITE = Path(sysconfig.get_paths()["purelib"])
MODELS = ("aot", "buckets", "tokens", "onnx", "tvm")
POISON = 666
RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {
        "aot": aot_release(folder / "aot"),
        "buckets": aot_release(folder / "buckets", 1, 8),
        "tokens": tokens_release(folder / "tokens", ((1, 4), (4, 16))),
        "onnx": onnx_release(folder / "onnx"),
        "tvm": tvm_release(folder / "tvm"),
        # Slow, so that requests gather; fails where a row starts with POISON.
        "poisoned": aot_release(folder / "poisoned", POISON=POISON, SLOW_MS=50),
    }


@pytest.fixture(scope="module")
def repositories(releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    settings = folder / "serve.toml"
    settings.write_text(
        "schema = 1\n[defaults]\ninstances = 2\nthreads = 1\nmax_batch_size = 8\nqueue_delay_us = 2000\n"
    )
    labels = folder / "labels.txt"
    labels.write_text("cat\ndog\nowl\n")
    options = {
        "buckets": ["--settings", str(settings)],
        "poisoned": ["--settings", str(settings)],
        "tvm": ["--labels", str(labels)],
        "aot": ["--response-cache"],
        "onnx": ["--python-backend"],
    }
    for name, release in releases.items():
        done = exported("triton", release, folder / name, "--name", name, *options.get(name, []))
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in releases}


@pytest.fixture(scope="module")
def triton(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    try:
        triton_folder()
    except TritonMissingError as reason:
        pytest.skip(str(reason))
    first, *more = repositories.values()
    arguments = [f"--model-repository={path}" for path in more] + ["--cache-config=local,size=4194304"]
    scratch = tmp_path_factory.mktemp("triton")
    with triton_serving(first, scratch, *arguments, packages=[SITE]) as server:
        yield server


@contextmanager
def ours(release: Path) -> Iterator[tuple[str, str]]:
    """Addresses of our server of one release."""
    command = [
        sys.executable,
        "-m",
        "toolchain.cli.main",
        "serve",
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        str(release),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            match = re.match(r"ready: http://(\S+) grpc://(\S+)", process.stdout.readline())
            assert match
            yield match[1], match[2]
        finally:
            process.terminate()
            process.wait(20)


def asked(kind: Any, address: str, model: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a server answers; ``kind`` is one of tritonclient's two modules."""
    with kind.InferenceServerClient(address) as client:
        inputs = []
        for name, array in arrays.items():
            tensor = kind.InferInput(name, list(array.shape), "FP32")
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        answer = client.infer(model, inputs)
        response = answer.get_response()
        outputs = response["outputs"] if isinstance(response, dict) else [{"name": o.name} for o in response.outputs]
        return {output["name"]: answer.as_numpy(output["name"]) for output in outputs}


def inputs_of(model: str, batch: int) -> dict[str, np.ndarray]:
    if model == "tokens":
        shapes: dict[str, tuple[int, ...]] = {"tokens": (batch, 3, 4), "mask": (batch, 3)}
    else:
        shapes = {"image": (batch, 4)}
    return {name: RANDOM.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("model", MODELS)
def test_triton_answers_what_our_server_answers_over_http_and_grpc(
    model: str, releases: dict[str, Path], triton: Triton
) -> None:
    with ours(releases[model]) as (our_http, our_grpc):
        for batch in (1, 3, 9):
            arrays = inputs_of(model, batch)
            for kind, theirs, mine in ((http, triton.http, our_http), (grpc, triton.grpc, our_grpc)):
                expected = asked(kind, mine, "sample", arrays)
                got = asked(kind, theirs, model, arrays)
                assert list(got) == list(expected)
                for name, array in expected.items():
                    assert got[name].shape == array.shape
                    assert np.array_equal(got[name], array), (model, batch, name)


def test_triton_knows_the_version_by_its_number_and_the_shapes_by_the_contract(triton: Triton) -> None:
    with http.InferenceServerClient(triton.http) as client:
        for model in MODELS:
            metadata = client.get_model_metadata(model)
            assert metadata["versions"] == ["1002003"]
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 4]}]
        assert triton_to_np_dtype(metadata["outputs"][0]["datatype"]) is np.float32
        assert client.get_model_config("aot")["parameters"]["release_version"] == {"string_value": "1.2.3"}


def test_the_recorded_inputs_ran_before_the_model_was_ready(triton: Triton) -> None:
    with http.InferenceServerClient(triton.http) as client:
        assert client.get_model_config("aot")["model_warmup"][0]["name"] == "recorded"
    assert "failed to run warmup" not in triton.said().lower()


def test_requests_that_come_together_are_run_as_one(releases: dict[str, Path], triton: Triton) -> None:
    good = {n: inputs_of("buckets", 1) for n in range(24)}
    with ours(releases["buckets"]) as (_, our_grpc):
        expected = {n: asked(grpc, our_grpc, "sample", arrays)["scores"] for n, arrays in good.items()}
    with http.InferenceServerClient(triton.http) as client:
        before = client.get_inference_statistics("buckets")["model_stats"][0]
    with ThreadPoolExecutor(12) as threads:
        got = dict(
            zip(
                good,
                threads.map(lambda a: asked(grpc, triton.grpc, "buckets", a)["scores"], good.values()),
                strict=True,
            )
        )
    for n, scores in expected.items():
        assert np.array_equal(got[n], scores)
    with http.InferenceServerClient(triton.http) as client:
        after = client.get_inference_statistics("buckets")["model_stats"][0]
    runs, rows = (after[key] - before[key] for key in ("execution_count", "inference_count"))
    assert rows == 24
    assert runs < rows


def test_a_request_outside_the_contract_is_refused_with_the_reason(triton: Triton) -> None:
    with pytest.raises(InferenceServerException, match="must have a size from 1 to 16, got 17"):
        asked(http, triton.http, "tokens", {"tokens": np.zeros((1, 17, 4), "f"), "mask": np.zeros((1, 17), "f")})
    assert asked(http, triton.http, "tokens", inputs_of("tokens", 1))["pooled"].shape == (1, 4)


def test_a_request_that_makes_a_merged_run_fail_fails_alone(triton: Triton) -> None:
    def answer(number: int) -> np.ndarray | str:
        image = np.full((1, 4), POISON if number % 6 == 0 else number, np.float32)
        try:
            return asked(http, triton.http, "poisoned", {"image": image})["scores"]
        except InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(answer, range(24)))
    for number, got in enumerate(answers):
        if number % 6 == 0:
            assert "the engine's run failed" in got
        else:
            assert np.allclose(got, expected_scores(np.full((1, 4), number, np.float32)), rtol=1e-5), got
    with http.InferenceServerClient(triton.http) as client:
        stats = client.get_inference_statistics("poisoned")["model_stats"][0]
    # Some of them were in a batch of several.
    assert any(batch["batch_size"] > 1 for batch in stats["batch_stats"])


def test_classes_are_answered_with_their_labels(triton: Triton) -> None:
    with http.InferenceServerClient(triton.http) as client:
        tensor = http.InferInput("image", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
        answer = client.infer("tvm", [tensor], outputs=[http.InferRequestedOutput("scores", class_count=1)])
    [[best]] = answer.as_numpy("scores")
    assert best.decode().split(":")[1:] == ["2", "owl"]


def test_equal_requests_are_answered_from_the_cache_where_it_was_asked_for(triton: Triton) -> None:
    arrays = inputs_of("aot", 2)
    first, second = (asked(http, triton.http, "aot", arrays)["scores"] for _ in range(2))
    assert np.array_equal(first, second)
    with http.InferenceServerClient(triton.http) as client:
        stats = client.get_inference_statistics("aot")["model_stats"][0]["inference_stats"]
    assert stats["cache_hit"]["count"] >= 1


def test_triton_itself_takes_the_configuration_for_its_onnxruntime_backend(
    releases: dict[str, Path], triton: Triton, tmp_path: Path
) -> None:
    """This Triton has no such backend: it gets as far as looking for it."""
    assert exported("triton", releases["onnx"], tmp_path / "repository").returncode == 0
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--model-control-mode=explicit"]
    with (
        triton_serving(tmp_path / "repository", scratch, *arguments) as server,
        http.InferenceServerClient(server.http) as client,
        pytest.raises(InferenceServerException, match="unable to find backend library for backend 'onnxruntime'"),
    ):
        client.load_model("sample")
