"""``toolchain serve`` as a process: one line when ready, answers, drains, and documented exit codes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle_samples import bundle_spec, matrix_engine, requirements
from tests.helpers.processes import descendants, running, wait_until
from tests.helpers.serving_core import TENTH, inputs_of, obedient_release
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.errors import ExitCode

pytest.importorskip("httptools")

COMMAND = [sys.executable, "-m", "toolchain.cli.main", "serve"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return obedient_release(tmp_path_factory.mktemp("releases"))


@contextmanager
def server(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on free ports, and its address."""
    words = [*COMMAND, "--http-port", "0", "--grpc-port", "0", "--threads", "1", *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.match(r"ready: (https?://\S+)", line)
            assert match, (line, process.stderr.read() if process.stderr and process.poll() is not None else "")
            yield process, match[1]
        finally:
            # Not killed: it would leave its temporary files behind.
            process.terminate()
            process.wait(20)


def ended(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, "--http-port", "0", "--grpc-port", "0", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=30)


def get(address: str, token: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return sent(urllib.request.Request(address, headers=headers))


def sent(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            text = response.read()
            return response.status, json.loads(text) if text[:1] == b"{" else text.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def body(value: float, work: int = 0) -> bytes:
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [value, value]},
        {"name": "index", "datatype": "INT64", "shape": [1], "data": [1]},
        {"name": "work", "datatype": "INT64", "shape": [1], "data": [work]},
    ]
    return json.dumps({"id": "7", "inputs": inputs}).encode()


def infer(address: str, value: float, work: int = 0) -> tuple[int, Any]:
    return sent(urllib.request.Request(f"{address}/v2/models/obedient/infer", body(value, work)))


def test_it_answers_and_ends_with_0_when_told_to_stop(release: Path) -> None:
    with server(release) as (process, address):
        assert get(f"{address}/v2/health/ready")[0] == 200
        status, answer = infer(address, 2.5)
        assert status == 200
        assert answer["outputs"][0]["data"] == [3.5, 3.5]
        assert (answer["model_version"], answer["id"]) == ("1.0.0", "7")
        assert 'nv_inference_request_success{model="obedient",version="1.0.0"} 1' in get(f"{address}/metrics")[1]
        assert get(f"{address}/v2/models/other")[0] == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_running_request_is_answered_after_sigterm(release: Path) -> None:
    with server(release) as (process, address):
        host, port = address.removeprefix("http://").rsplit(":", 1)
        content = body(1, 5 * TENTH)
        with socket.create_connection((host, int(port)), 20) as connection:
            head = f"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"2.0" in answer
        assert process.wait(10) == 0


def test_no_worker_outlives_a_killed_server(release: Path) -> None:
    with server(release, "--instances", "2") as (process, _):
        workers = descendants(process.pid)
        assert len(workers) == 2
        process.kill()
        process.wait()
        wait_until(lambda: not running(workers), "the workers end")


def test_tokens_and_admin(release: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    with server(release, "--token-file", tokens, "--allow-admin", "--no-grpc") as (_, address):
        assert get(f"{address}/v2/models/obedient")[0] == 401
        assert get(f"{address}/v2/models/obedient", "secret")[0] == 200
        headers = {"Authorization": "Bearer secret"}
        for action, ready in (("unload", False), ("load", True)):
            url = f"{address}/v2/repository/models/obedient/{action}"
            assert sent(urllib.request.Request(url, b"{}", headers, method="POST"))[0] == 200
            assert (get(f"{address}/v2/models/obedient/ready", "secret")[0] == 200) is ready


def test_bad_settings_a_port_in_use_and_nothing_to_serve_end_with_2(release: Path, tmp_path: Path) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text("[defaults]\ninstances = 0\n")
    result = ended(release, "--settings", settings)
    assert result.returncode == ExitCode.USAGE
    assert "defaults.instances: got 0" in result.stderr
    settings.write_text("[models.obedeint]\ninstances = 1\n")
    result = ended(release, "--settings", settings)
    assert result.returncode == ExitCode.USAGE
    assert "did you mean 'obedient'?" in result.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = ended(release, "--http-port", str(taken.getsockname()[1]))
        assert result.returncode == ExitCode.USAGE
        assert f"port {taken.getsockname()[1]} is in use" in result.stderr
        result = ended(release, "--grpc-port", str(taken.getsockname()[1]))
        assert result.returncode == ExitCode.USAGE
        assert f"port {taken.getsockname()[1]} is in use" in result.stderr
    assert ended().returncode == ExitCode.USAGE
    result = subprocess.run([*COMMAND, str(release), "--tune", "--threads", "2"], capture_output=True, text=True)
    assert result.returncode == ExitCode.USAGE
    assert "--tune finds the settings itself and serves nobody; it does not take --threads" in result.stderr
    assert ended(tmp_path / "none").returncode == ExitCode.USAGE
    assert ended(release, "--tls-cert", tmp_path / "c.pem").returncode == ExitCode.USAGE
    result = ended(release, "--tls-cert", tmp_path / "c.pem", "--tls-key", tmp_path / "k.pem")
    assert result.returncode == ExitCode.USAGE
    assert "Traceback" not in result.stderr


def test_bundles_that_cannot_be_served_have_their_exit_codes(tmp_path: Path) -> None:
    failing = ended(obedient_release(tmp_path / "a", recorded=3.0))
    assert failing.returncode == ExitCode.DAMAGED_BUNDLE
    assert "the self-test failed" in failing.stderr
    assert "Traceback" not in failing.stderr
    elsewhere = tmp_path / "b"
    spec = bundle_spec(matrix_engine(tmp_path / "engine"), "any", requirements(["no-such-feature"]))
    pack_release("sample", "1.0.0", [pack_bundle(spec)], elsewhere)
    result = ended(elsewhere)
    assert result.returncode == ExitCode.INCOMPATIBLE_HOST
    assert "no-such-feature" in result.stderr


def test_the_server_loads_no_engine_itself_and_its_only_worker_is_the_one_that_was_prepared(release: Path) -> None:
    """What a start costs: engines are loaded beside the server, in the one process that was started first of all."""
    with server(release) as (process, _):
        (worker,) = descendants(process.pid)
        mapped = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, worker)}
        assert "onnxruntime" in mapped[worker]
        for library in ("onnxruntime", "libtorch", "libtvm"):
            assert library not in mapped[process.pid]
        for library in ("uvloop", "grpc", "libtorch"):
            assert library not in mapped[worker]


def test_existing_clients_work_over_both_protocols(release: Path) -> None:
    clients = [pytest.importorskip("tritonclient.http"), pytest.importorskip("tritonclient.grpc")]
    words = [*COMMAND, "--http-port", "0", "--grpc-port", "0", "--threads", "1", "--allow-admin", str(release)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            addresses = re.findall(r"127\.0\.0\.1:\d+", process.stdout.readline())
            for module, address in zip(clients, addresses, strict=True):
                with module.InferenceServerClient(address) as client:
                    _use(module, client)
        finally:
            process.terminate()
        assert process.wait(10) == 0


def _use(module: Any, client: Any) -> None:
    assert client.is_server_ready()
    assert client.is_model_ready("obedient", "1.0.0")
    given = []
    for name, array in inputs_of(2.0, index=3, rows=2).items():
        given.append(module.InferInput(name, array.shape, {"f": "FP32", "i": "INT64"}[array.dtype.kind]))
        given[-1].set_data_from_numpy(array)
    assert (client.infer("obedient", given).as_numpy("y") == 5).all()
    given[0].set_shape([1, 8])
    with pytest.raises(Exception, match="batch is 2 in input 'index' and 1 in input 'x'"):
        client.infer("obedient", given)
    client.get_model_metadata("obedient")
    client.get_model_config("obedient")
    client.get_inference_statistics("obedient")
    client.unload_model("obedient")
    assert not client.is_model_ready("obedient")
    client.load_model("obedient")
    assert client.is_model_ready("obedient")
