"""What nobody would send, sent to a real server: no 5xx that is not documented, no crash, nothing left open."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.processes import descendants
from tests.helpers.serving_core import inputs_of, obedient_release

grpc = pytest.importorskip("grpc")
pytest.importorskip("httptools")

PATH = "/v2/models/obedient/infer"
METHODS = ("ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady", "RepositoryIndex")
METHODS += ("SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "LogSettings", "TraceSetting", "ServerMetadata")
SETTINGS = "schema = 1\nhttp_port = 0\ngrpc_port = 0\nadmin = true\nshared_memory = true\n[defaults]\nthreads = 1\n"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


class Server(NamedTuple):
    pid: int
    http: int
    grpc: int

    def workers(self) -> list[int]:
        return descendants(self.pid)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Kilobytes."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found[1])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=20) as response:
            return str(response.read().decode())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "serve.toml").write_text(SETTINGS)
    words = [sys.executable, "-m", "toolchain.cli.main", "serve", "--settings", str(folder / "serve.toml")]
    words.append(str(obedient_release(folder)))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            ports = re.findall(r":(\d+)", process.stdout.readline())
            yield Server(process.pid, *map(int, ports))
            assert process.poll() is None
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    """The server, which afterwards has as many workers and open files as before, and about its memory."""
    assert post(started, valid_body(), {"Inference-Header-Content-Length": str(len(valid_head()))})[0] == 200
    workers, files, memory = started.workers(), started.files(), started.memory()
    yield started
    assert post(started, valid_body(), {"Inference-Header-Content-Length": str(len(valid_head()))})[0] == 200
    assert len(started.workers()) == len(workers)
    assert started.files() <= files + 4
    assert started.memory() < memory + 30_000
    assert 'status="500"' not in started.get("/metrics")


def valid_head() -> bytes:
    names = {"float32": "FP32", "int64": "INT64"}
    inputs = [
        {
            "name": name,
            "datatype": names[array.dtype.name],
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in inputs_of(1.0).items()
    ]
    return json.dumps({"inputs": inputs}).encode()


def valid_body() -> bytes:
    return valid_head() + b"".join(array.tobytes() for array in inputs_of(1.0).values())


def post(server: Server, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.http, timeout=20)
    try:
        connection.request("POST", PATH, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Something valid with pieces cut out, put in or changed; or anything at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=300))
    body = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = start + draw(st.sampled_from([0, 1, 2, 8, 1000]))
        body[start:end] = draw(st.binary(max_size=12) | st.sampled_from([b'"', b"-", b"9" * 20, b"null", b"[" * 40]))
    return bytes(body)


def test_damaged_binary_requests_are_answered_or_refused(server: Server) -> None:
    lengths = st.sampled_from(["0", "1", str(len(valid_head())), "99999", "-1", "x", str(2**63), ""])

    @FUZZ
    @given(damaged(valid_body()), lengths)
    def sends(body: bytes, length: str) -> None:
        status, answer = post(server, body, {"Inference-Header-Content-Length": length} if length else {})
        assert status == 200 or (400 <= status < 500 and json.loads(answer)["error"])

    sends()


def valid_message(pb: Any) -> bytes:
    message = pb.ModelInferRequest(model_name="obedient", id="1")
    for name, array in inputs_of(1.0).items():
        datatype = "FP32" if array.dtype.kind == "f" else "INT64"
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return bytes(message.SerializeToString())


def test_damaged_grpc_messages_are_answered_or_refused(server: Server) -> None:
    from toolchain.runtime.server.proto import stubs

    pb = stubs()
    allowed = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        calls = {name: channel.unary_unary(f"/inference.GRPCInferenceService/{name}") for name in METHODS}
        assert calls["ModelInfer"](valid_message(pb), timeout=20)

        @FUZZ
        @given(st.sampled_from([*METHODS, *["ModelInfer"] * 20]), damaged(valid_message(pb)))
        def sends(method: str, message: bytes) -> None:
            error: Any = calls[method].future(message, timeout=20).exception()
            assert error is None or error.code().name in allowed, error

        sends()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_every_answer_is_as_the_openapi_document_says(server: Server, tmp_path: Path) -> None:
    """Requests made from the document, valid and not; the names in paths are of what is there, or random."""
    document = json.loads(server.get("/v2/openapi.json"))
    known = {"model": ["obedient", "other"], "version": ["1.0.0", "2"], "region": ["one"]}
    named = [p for item in document["paths"].values() for p in item.get("parameters", ()) if p["in"] == "path"]
    assert {parameter["name"] for parameter in named} == set(known)
    for parameter in named:
        parameter["schema"] = {"enum": known[parameter["name"]]}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    checks = "status_code_conformance,content_type_conformance,response_schema_conformance"
    words = [sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json")]
    words += ["--url", f"http://127.0.0.1:{server.http}", "--checks", checks, "--max-examples", "15"]
    words += ["--phases", "coverage,fuzzing", "--max-time", "30", "--no-color", "--suppress-health-check", "all"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    # It may have unloaded the model last.
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.http}/v2/repository/models/obedient/load", b"{}", 30
    ) as response:
        assert response.status == 200
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", result.stdout)[-1]) > 50


def test_what_is_no_message_is_refused_as_invalid_and_does_not_end_a_stream(server: Server) -> None:
    from toolchain.runtime.server.proto import stubs

    pb = stubs()
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\x00", timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        messages = iter([b"\x00", valid_message(pb)])
        first, second = (pb.ModelStreamInferResponse.FromString(m) for m in stream(messages, timeout=20))
        assert "no message" in first.error_message
        assert second.infer_response.outputs[0].name == "y"
