"""Exports in the servers they are for, MLServer and Ray Serve, each in an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_samples import expected_scores
from helpers.export_samples import aot_release, exported
from helpers.foreign_venv import ROOT, foreign_python
from helpers.ports import free_ports
from helpers.processes import descendants, running, wait_until
from helpers.ray_calls import asked, refused, replicas

from toolchain.cli.main import cli
from toolchain.errors import ExitCode, ToolchainError

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def sent(address: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_mlserver_serves_the_exported_folder(tmp_path: Path) -> None:
    python = foreign_python("mlserver", "mlserver==1.7.1")
    folder = tmp_path / "served"
    assert exported("mlserver", aot_release(tmp_path, 1, 8), folder).returncode == 0
    http, grpc, metrics = free_ports(3)
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics, "host": "127.0.0.1"}
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | ports))
    image = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    tensor = {"name": "image", "datatype": "FP32", "shape": [3, 4], "data": image.ravel().tolist()}
    model = f"http://127.0.0.1:{http}/v2/models/sample"
    log = tmp_path / "log"
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            [python.with_name("mlserver"), "start", "."], cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output
        ) as process,
    ):
        try:
            wait_for(f"{model}/ready", process, log)
            status, answer = sent(f"{model}/infer", {"inputs": [tensor]})
            assert status == 200, answer
            [scores] = answer["outputs"]
            assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [3, 3])
            assert np.allclose(np.reshape(scores["data"], (3, 3)), expected_scores(image), atol=1e-5)
            assert answer["model_version"] == "1.2.3"
            status, answer = sent(f"{model}/infer", {"inputs": [tensor | {"name": "imag"}]})
            assert status == 400
            assert "did you mean 'image'" in answer["error"]
            assert sent(f"{model}/infer", {"inputs": [tensor | {"shape": [3, 5]}]})[0] == 400
        finally:
            process.terminate()
            process.wait(20)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if sent(address)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


@pytest.mark.xdist_group("ray")
def test_ray_serve_loses_no_request_when_replicas_are_killed_under_load(tmp_path: Path) -> None:
    python = foreign_python("ray", "ray[serve]==2.60.0")
    folder = tmp_path / "served"
    done = exported("ray-serve", aot_release(tmp_path), folder, "--min-replicas", "2", "--max-replicas", "3")
    assert done.returncode == 0, done.stderr
    [port] = free_ports(1)
    words = [python, Path(__file__).parents[1] / "helpers" / "ray_driver.py", str(port), "600", "2"]
    # Workers import app.py too; `serve run` sees to that by itself.
    places = {"PYTHONPATH": f"{folder}:{ROOT}", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    ran = subprocess.run(words, env=ENVIRONMENT | places, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-3000:]
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["lost"] == []
    assert figures["answered"] == 600
    assert figures["killed"] == 2
    assert figures["most"] >= 2
    assert figures["refused"] == 400


@pytest.mark.xdist_group("ray")
def test_serve_on_ray_loses_no_request_when_a_replica_is_killed_and_ends_when_told(tmp_path: Path) -> None:
    python = foreign_python("ray", "ray[serve]==2.60.0")
    [port] = free_ports(1)
    words = ["serve", str(aot_release(tmp_path)), "--on", "ray", f"--http-port={port}", "--min-replicas=2"]
    environment = ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    command = [python, "-m", "toolchain.cli.main", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        line = run.stdout.readline()
        assert line == f"ready: http://127.0.0.1:{port} (sample 1.2.3, 2 to 4 replicas on ray)\n", run.stderr.read()
        family = descendants(run.pid)
        with ThreadPoolExecutor(8) as clients:
            results = [clients.submit(asked, f"http://127.0.0.1:{port}", 1.0 + n % 7) for n in range(400)]
            wait_until(lambda: sum(r.done() for r in results) > 100, "some are answered", 60)
            alive = replicas("sample")
            assert len(alive) >= 2
            os.kill(min(alive), signal.SIGKILL)
            assert all(result.result() for result in results)
        assert refused(f"http://127.0.0.1:{port}") == 400
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    wait_until(lambda: not running(family), "the cluster ends", 20)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--on", "ray", "--grpc-port", "1", "--watch", "x"], "does not take --grpc-port, --watch"),
        (["--on", "ray", "--http-port", "0"], "on a port that is given"),
        (["--min-replicas", "2"], "belong to --on ray"),
    ],
)
def test_serve_on_ray_says_what_it_does_not_take(words: list[str], told: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        CliRunner().invoke(cli, ["serve", "somewhere", *words], catch_exceptions=False)
    assert caught.value.code is ExitCode.USAGE
    assert told in caught.value.what


def test_serve_on_ray_needs_ray(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        CliRunner().invoke(cli, ["serve", str(aot_release(tmp_path)), "--on", "ray"], catch_exceptions=False)
    assert caught.value.code is ExitCode.MISSING_TOOL
    assert "[ray]" in caught.value.hint
