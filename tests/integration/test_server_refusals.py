"""Every request that is refused shows in the metrics and, up to ten a second, in the log; once."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.helpers.serving import Running, serving
from tests.helpers.serving_core import TENTH, inputs_of, obedient_release, request_of
from tests.helpers.serving_core import serving as serving_core
from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.frontend import FrontendSettings, Listen, bearer_tokens, start
from toolchain.runtime.server.http_reply import refusal
from toolchain.runtime.server.proto import stubs

pb = stubs()
METHOD = "/inference.GRPCInferenceService/ModelInfer"
INFER = "POST /v2/models/double/infer HTTP/1.1"


@pytest.fixture
def server() -> Iterator[Running]:
    limits = FrontendSettings(max_body=10_000, body_timeout=0.2, authorize=bearer_tokens(["a"]))
    with serving(limits, grpc=True) as running:
        yield running


def ask(server: Running, line: str, body: bytes = b"", *headers: str, length: int | None = None) -> str:
    with server.connect() as connection:
        size = f"Content-Length: {len(body) if length is None else length}"
        lines = [line, "Host: a", size, "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode() + body)
        answer = b""
        while more := connection.recv(1 << 16):
            answer += more
    return answer.decode()


def refused(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [r.__dict__["facts"] for r in caplog.records if r.getMessage() in ("request refused", "request failed")]


TOKEN = "Authorization: Bearer a"


@pytest.mark.parametrize(
    ("status", "line", "body", "length", "headers"),
    [
        (400, INFER, b"{", None, [TOKEN]),
        (400, INFER, json.dumps({"inputs": []}).encode(), None, [TOKEN]),
        (401, INFER, b"{}", None, []),
        (403, "POST /v2/repository/models/double/load HTTP/1.1", b"", None, [TOKEN]),
        (404, "POST /v2/models/nobody/infer HTTP/1.1", b'{"inputs":[{"name":"x"}]}', None, [TOKEN]),
        (404, "GET /nowhere HTTP/1.1", b"", None, [TOKEN]),
        (405, "DELETE /v2 HTTP/1.1", b"", None, [TOKEN]),
        (408, INFER, b"{", 100, [TOKEN]),
        (413, INFER, b"", 20_000, [TOKEN]),
        (431, INFER, b"", None, [TOKEN, "X: " + "x" * 20_000]),
        (400, "nonsense", b"", None, [TOKEN]),
    ],
)
def test_what_http_refuses_is_counted_and_logged(
    server: Running,
    caplog: pytest.LogCaptureFixture,
    status: int,
    line: str,
    body: bytes,
    length: int | None,
    headers: list[str],
) -> None:
    if status == 404 and "nobody" in line:
        described = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}
        body = json.dumps({"inputs": [described]}).encode()
    with caplog.at_level(logging.INFO, "toolchain.serve"):
        answer = ask(server, line, body, *headers, length=length)
    assert answer.startswith(f"HTTP/1.1 {status} "), answer
    (facts,) = refused(caplog)
    assert facts["status"] == status
    assert facts["error"] == json.loads(answer.partition("\r\n\r\n")[2])["error"]
    metrics = ask(server, "GET /metrics HTTP/1.1", b"", TOKEN)
    assert f'toolchain_http_answers_total{{status="{status}"}} 1' in metrics


def test_what_grpc_refuses_is_counted_and_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    token = [("authorization", "Bearer a")]
    with caplog.at_level(logging.INFO, "toolchain.serve"), grpc.insecure_channel(server.grpc) as channel:
        stub = channel.unary_unary(METHOD)
        for body, metadata in ((b"\xff", token), (b"", token), (b"", []), (b"\0" * 200_000, token)):
            with pytest.raises(grpc.RpcError):
                stub(body, timeout=5, metadata=metadata)
        answers = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            iter([b"\xff"]), timeout=5, metadata=token
        )
        assert pb.ModelStreamInferResponse.FromString(next(answers)).error_message
    assert [facts["status"] for facts in refused(caplog)] == [
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        "UNAUTHENTICATED",
        "RESOURCE_EXHAUSTED",
        "INVALID_ARGUMENT",
    ]
    metrics = ask(server, "GET /metrics HTTP/1.1", b"", TOKEN)
    assert 'toolchain_grpc_answers_total{code="INVALID_ARGUMENT"} 3' in metrics
    assert 'toolchain_grpc_answers_total{code="UNAUTHENTICATED"} 1' in metrics


def test_a_full_queue_and_a_late_request_are_counted_by_model_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(timeout: int = 0) -> bytes:
        types = {"float32": "FP32", "int64": "INT64"}
        inputs = [
            {"name": name, "datatype": types[a.dtype.name], "shape": a.shape, "data": a.ravel().tolist()}
            for name, a in inputs_of(1.0).items()
        ]
        return json.dumps({"inputs": inputs, "parameters": {"timeout": timeout}}).encode()

    async def ask_(port: int, text: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + text)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    async def main() -> str:
        async with serving_core(obedient_release(tmp_path), queue_size=1) as core:
            frontends = await start(core, FrontendSettings(), Listen(http_port=0, grpc_port=None))
            blocker = asyncio.create_task(core.infer(request_of(1, work=3 * TENTH)))
            await asyncio.sleep(0.02)
            late = asyncio.create_task(ask_(frontends.http_port, body(timeout=10_000)))
            await asyncio.sleep(0.005)
            full = await ask_(frontends.http_port, body())
            assert full.startswith(b"HTTP/1.1 429 "), full
            assert b"Retry-After" in full
            assert (await late).startswith(b"HTTP/1.1 408 ")
            await blocker
            metrics = core.metrics() + frontends.http.metrics()
            await frontends.drain(0)
            return metrics.decode()

    with caplog.at_level(logging.INFO, "toolchain.serve"):
        metrics = asyncio.run(main())
    assert re.search(r'nv_inference_request_failure{model="obedient".*reason="REJECTED"} 2', metrics)
    assert 'answers_total{status="429"} 1' in metrics
    assert 'answers_total{status="408"} 1' in metrics
    assert sorted(facts["status"] for facts in refused(caplog)) == [408, 429]


def test_refusals_can_not_fill_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "toolchain.serve"), server.connect() as connection:
        request = b"GET /nowhere HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\n\r\n"
        connection.sendall(request * 300)
        answers = b""
        end = time.monotonic() + 10
        while answers.count(b"HTTP/1.1 404") < 300 and time.monotonic() < end:
            answers += connection.recv(1 << 16)
    assert 10 <= len(refused(caplog)) <= 20
    assert 'answers_total{status="404"} 300' in ask(server, "GET /metrics HTTP/1.1", b"", TOKEN)


def test_an_error_knows_whether_it_was_logged() -> None:
    error = ServeError(Status.INVALID, "no")
    assert not refusal(error).logged
    error.logged = True
    assert refusal(error).logged
