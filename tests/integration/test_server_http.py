"""The HTTP front end over real sockets: clients that work, and clients that don't."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import shutil
import ssl
import struct
import subprocess
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.helpers.serving import Running, serving
from toolchain.runtime.server.frontend import FrontendSettings, TlsFiles, bearer_tokens

INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
BODY = json.dumps({"inputs": [INPUT]}).encode()
DOUBLE = "/v2/models/double/infer"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FrontendSettings(allow_admin=True, allow_shared_memory=True)) as running:
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with small limits and short times."""
    limits = FrontendSettings(
        max_body=100_000,
        max_head=2_000,
        max_connections=20,
        max_pending=150_000,
        head_timeout=0.3,
        body_timeout=0.3,
        idle_timeout=0.6,
        write_timeout=0.5,
        authorize=bearer_tokens(["secret"]),
    )
    with serving(limits) as running:
        yield running


def post(path: str, body: bytes = BODY, *headers: str, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_reply(stream: Any) -> tuple[int, dict[str, str], bytes]:
    status = int(stream.readline().split()[1])
    headers: dict[str, str] = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, stream.read(int(headers.get("content-length", 0)))


def ask(server: Running, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    with server.connect() as connection, connection.makefile("rb") as stream:
        with contextlib.suppress(ConnectionError):  # refused before all was sent; the answer is there
            connection.sendall(raw)
        return read_reply(stream)


def error_of(reply: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    document = json.loads(reply[2])
    assert list(document) == ["error"]
    return reply[0], document["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_right_answers(server: Running, binary: bool) -> None:
    with triton.InferenceServerClient(server.http) as client:
        x = np.arange(4000, dtype=np.float32).reshape(-1, 4)
        tensor = triton.InferInput("x", x.shape, "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary)
        wanted = triton.InferRequestedOutput("y", binary_data=binary)
        for request in ("gzip", "deflate", None):
            for response in ("gzip", "deflate", None):
                result = client.infer(
                    "double",
                    [tensor],
                    outputs=[wanted],
                    request_id="7",
                    request_compression_algorithm=request,
                    response_compression_algorithm=response,
                )
                assert (result.as_numpy("y") == x * 2).all()
                assert result.get_response()["id"] == "7"
        assert client.get_model_metadata("double")["inputs"][0]["datatype"] == "FP32"
        assert client.get_model_config("double")["max_batch_size"] == 8
        assert client.get_inference_statistics("double")["model_stats"][0]["inference_count"] == 3
        assert {e["name"] for e in client.get_model_repository_index()} >= {"double", "text"}
        assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
        assert client.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
        assert client.get_trace_settings()["trace_level"] == ["OFF"]


def test_tritons_client_sees_models_come_and_go(server: Running) -> None:
    with triton.InferenceServerClient(server.http) as client:
        client.unload_model("text")
        assert not client.is_server_ready()
        assert not client.is_model_ready("text")
        client.load_model("text")
        assert client.is_server_ready()
        assert client.is_model_ready("text", "1")
        assert not client.is_model_ready("nothing")
        with pytest.raises(InferenceServerException, match="unknown model 'nothing'"):
            client.get_model_metadata("nothing")


def test_tritons_client_sends_text(server: Running) -> None:
    with triton.InferenceServerClient(server.http) as client:
        words = np.array(["a", "", "häßlich"], np.object_)
        for binary in (True, False):
            tensor = triton.InferInput("x", [3], "BYTES")
            tensor.set_data_from_numpy(words, binary_data=binary)
            result = client.infer("text", [tensor], outputs=[triton.InferRequestedOutput("y", binary_data=binary)])
            got = [e if isinstance(e, str) else e.decode() for e in result.as_numpy("y").tolist()]
            assert got == words.tolist()


def test_tritons_client_uses_shared_memory(server: Running) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    region = shm.create_shared_memory_region("r", "/toolchain_test_http", 64)
    try:
        shm.set_shared_memory_region(region, [x])
        with triton.InferenceServerClient(server.http) as client:
            client.register_system_shared_memory("r", "/toolchain_test_http", 64)
            assert client.get_system_shared_memory_status()[0]["byte_size"] == 64
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_shared_memory("r", 32)
            output = triton.InferRequestedOutput("y")
            output.set_shared_memory("r", 32, offset=32)
            result = client.infer("double", [tensor], outputs=[output])
            assert result.get_output("y")["parameters"]["shared_memory_byte_size"] == 32
            assert (shm.get_contents_as_numpy(region, np.float32, [2, 4], 32) == x * 2).all()
            output.set_shared_memory("r", 31, offset=32)
            with pytest.raises(InferenceServerException, match="has 32 bytes, its place"):
                client.infer("double", [tensor], outputs=[output])
            tensor.set_shared_memory("r", 32, offset=40)
            with pytest.raises(InferenceServerException, match="outside shared memory region"):
                client.infer("double", [tensor])
            for key in ("../../etc/passwd", "/../x", ".", "a/b"):
                with pytest.raises(InferenceServerException, match="no name of a shared memory object"):
                    client.register_system_shared_memory("evil", key, 8)
            with pytest.raises(InferenceServerException, match="has 64 bytes, 128 are needed"):
                client.register_system_shared_memory("big", "/toolchain_test_http", 128)
            client.unregister_system_shared_memory()
            assert client.get_system_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(region)


def test_tritons_asyncio_client_gets_right_answers(server: Running) -> None:
    async def many() -> None:
        async with triton_aio.InferenceServerClient(server.http) as client:
            x = np.arange(40_000, dtype=np.float32).reshape(-1, 4)
            tensor = triton_aio.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x)
            for result in await asyncio.gather(*[client.infer("double", [tensor]) for _ in range(8)]):
                assert (result.as_numpy("y") == x * 2).all()

    asyncio.run(many())


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_right_answers(server: Running, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(BODY)
    for flags in (
        [],
        ["-H", "Transfer-Encoding: chunked"],
        ["--compressed"],
        ["-H", "Expect: 100-continue"],
        ["--http2"],
    ):
        command = ["curl", "-sSf", *flags, "--data-binary", f"@{tmp_path}/body", f"http://{server.http}{DOUBLE}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        assert json.loads(done.stdout)["outputs"][0]["data"] == [2, 4, 6, 8]


def test_every_path_of_the_openapi_document_is_answered_as_it_says(server: Running) -> None:
    document = json.loads(ask(server, b"GET /v2/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")[2])
    for path, methods in document["paths"].items():
        filled = path.replace("{model}", "double").replace("{version}", "1").replace("{region}", "r")
        for method in ("get", "post"):
            raw = f"{method.upper()} {filled} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            status, headers, body = ask(server, raw)
            if method in methods:
                assert str(status) in methods[method]["responses"], (path, method, status, body)
                assert b"no such path" not in body
                assert status != 500, (path, body)
            else:
                assert (status, headers["allow"]) == (405, "POST" if method == "get" else "GET, HEAD")


def test_pages_for_people_and_prometheus_are_there(server: Running) -> None:
    status, headers, page = ask(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<td>double</td>" in page
    assert b'toolchain_http_answers_total{status="200"}' in ask(server, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")[2]
    status, headers, _ = ask(server, b"HEAD /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert status == 200
    assert int(headers["content-length"]) > 0


MALFORMED = [
    (post(DOUBLE, b"{"), 400, "valid JSON"),
    (post(DOUBLE, b'{"inputs": [NaN]}'), 400, "valid JSON"),
    (post(DOUBLE, b""), 400, "valid JSON"),
    (post(DOUBLE, BODY, "Inference-Header-Content-Length: 1000"), 400, "the body has"),
    (post(DOUBLE, BODY, "Inference-Header-Content-Length: -1"), 400, "whole number"),
    (post(DOUBLE, BODY + b"0000", f"Inference-Header-Content-Length: {len(BODY)}"), 400, "4 bytes follow"),
    (post(DOUBLE, BODY, "Content-Encoding: br"), 501, "'br' is not supported"),
    (post(DOUBLE, BODY, "Content-Encoding: gzip"), 400, "damaged"),
    (post(DOUBLE, BODY, "Transfer-Encoding: gzip, chunked", length=False), 501, "only 'chunked'"),
    (post(DOUBLE, BODY, "Expect: tea"), 417, "100-continue"),
    (post("/v2/models/nothing/infer"), 404, "unknown model"),
    (post("/v2/models/double/versions/9/infer"), 404, "no version '9'"),
    (post("/v2/models/double/tea"), 404, "no such path"),
    (post("/v2/models/%ff%00/infer"), 404, "unknown model"),
    (post("/v2/models/busy/infer"), 429, "queue is full"),
    (post("/v2/models/broken/infer"), 500, "its log says why"),
    (post("/v2/cudasharedmemory/region/r/register", b"{}"), 501, "CUDA"),
    (post("/v2/trace/setting", b"{}"), 501, "can't be changed"),
    (post("/v2/logging", b'{"log_verbose_level": -1}'), 400, "at least 0"),
    (b"GET /v2 HTTP/1.1\r\n\r\n", 400, "Host"),
    (b"nonsense\r\n\r\n", 400, "valid HTTP"),
    (b"GET /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "valid HTTP"),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "valid HTTP"),
    (post(DOUBLE, b"zz\r\n", "Transfer-Encoding: chunked", length=False), 400, "valid HTTP"),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "more than"),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", 431, "more than"),
    (b"POST " + DOUBLE.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413, "at most"),
]


@pytest.mark.parametrize(("raw", "status", "says"), MALFORMED)
def test_a_request_that_can_not_be_answered_gets_one_clear_error(
    server: Running, raw: bytes, status: int, says: str
) -> None:
    got, message = error_of(ask(server, raw))
    assert (got, says in message) == (status, True), (got, message)


def test_a_full_queue_says_when_to_come_again(server: Running) -> None:
    assert ask(server, post("/v2/models/busy/infer"))[1]["retry-after"] == "2"


def test_chunked_bodies_arrive_whole(server: Running) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\nTrailer: x\r\n\r\n"
    raw = post(DOUBLE, chunks, "Transfer-Encoding: chunked", length=False)
    assert json.loads(ask(server, raw)[2])["outputs"][0]["data"] == [2, 4, 6, 8]


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    def numbered(n: int) -> bytes:
        return post(DOUBLE, json.dumps({"id": str(n), "inputs": [INPUT]}).encode())

    with server.connect() as connection:
        stream = connection.makefile("rb")
        connection.sendall(b"".join(numbered(n) for n in range(2000)))
        assert [json.loads(read_reply(stream)[2])["id"] for n in range(2000)] == [str(n) for n in range(2000)]


def test_a_large_body_in_pieces_and_what_follows_it_are_both_answered(server: Running) -> None:
    x = np.arange(200_000, dtype=np.float32)
    entry = {"name": "x", "datatype": "FP32", "shape": [50_000, 4], "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    raw = post(DOUBLE, head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}")
    server.core.keep = True
    with server.connect() as connection:
        stream = connection.makefile("rb")
        whole = raw + post(DOUBLE) + raw + post(DOUBLE)
        for at in range(0, len(whole), 37_777):
            connection.sendall(whole[at : at + 37_777])
        for _ in range(2):
            status, headers, body = read_reply(stream)
            assert status == 200
            assert (np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32) == x * 2).all()
            assert json.loads(read_reply(stream)[2])["outputs"][0]["data"] == [2, 4, 6, 8]
    server.core.keep = False
    large = server.core.requests[0].inputs["x"]
    assert large.base is not None, "a view of the body, no copy"
    assert large.ctypes.data % 64 == 0
    server.core.requests.clear()


def test_a_client_that_goes_cancels_its_request(server: Running) -> None:
    before, started = server.core.cancelled, server.core.started
    with server.connect() as connection:
        connection.sendall(post("/v2/models/slow/infer"))
        _until(lambda: server.core.started > started)
    _until(lambda: server.core.cancelled > before)


def test_a_gzip_bomb_is_refused_before_it_unfolds(strict: Running) -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = stream.compress(bytes(50_000_000)) + stream.flush()
    assert len(bomb) < 100_000
    raw = post(DOUBLE, bomb, "Content-Encoding: gzip", "Authorization: Bearer secret")
    assert error_of(ask(strict, raw)) == (413, "the decompressed request has more than 100000 bytes")


def test_a_body_without_announced_length_is_bounded(strict: Running) -> None:
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    raw = post(DOUBLE, chunk * 5, "Transfer-Encoding: chunked", "Authorization: Bearer secret", length=False)
    assert error_of(ask(strict, raw))[0] == 413


def test_the_bodies_of_all_clients_together_are_bounded(strict: Running) -> None:
    head = post(DOUBLE, b"", "Authorization: Bearer secret", "Content-Length: 90000", length=False)
    with strict.connect() as first:
        first.sendall(head + b"a")
        _until(lambda: strict.frontends.http.pending == 90_000)
        status, headers, _ = ask(strict, head)
        assert (status, headers["retry-after"]) == (503, "1")
    _until(lambda: strict.frontends.http.pending == 0)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"POST / HT"],
        [b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 20],
        [post(DOUBLE, BODY, "Authorization: Bearer secret")[:-5]],
        [post(DOUBLE, b"", "Authorization: Bearer secret", "Content-Length: 90000", length=False), b"a" * 40_000],
    ],
)
def test_a_request_that_comes_too_slowly_is_given_up(strict: Running, pieces: list[bytes]) -> None:
    began = time.monotonic()
    with strict.connect() as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            time.sleep(0.05)
        assert error_of(read_reply(connection.makefile("rb")))[0] == 408
    assert time.monotonic() - began < 3


def test_an_idle_connection_is_closed_without_a_word(strict: Running) -> None:
    with strict.connect() as connection:
        assert connection.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with serving(FrontendSettings(write_timeout=0.3)) as running, running.connect() as connection:
        x = np.zeros(4_000_000, np.float32)
        entry = {"name": "x", "datatype": "FP32", "shape": [1_000_000, 4], "parameters": {"binary_data_size": x.nbytes}}
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        connection.sendall(post(DOUBLE, head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}"))
        _until(lambda: not running.frontends.http.connections)


def test_more_connections_than_allowed_are_turned_away(strict: Running) -> None:
    _until(lambda: not strict.frontends.http.connections)
    held = [strict.connect() for _ in range(20)]
    try:
        _until(lambda: len(strict.frontends.http.connections) == 20)
        with strict.connect() as connection:
            status, headers, _ = read_reply(connection.makefile("rb"))
            assert (status, headers["retry-after"]) == (503, "1")
    finally:
        for connection in held:
            connection.close()


def test_a_token_is_needed_except_for_health(strict: Running) -> None:
    _until(lambda: not strict.frontends.http.connections)
    status, headers, _ = ask(strict, post(DOUBLE))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert ask(strict, post(DOUBLE, BODY, "Authorization: Bearer wrong"))[0] == 401
    assert ask(strict, post(DOUBLE, BODY, "Authorization: Basic secret"))[0] == 401
    assert ask(strict, post(DOUBLE, BODY, "Authorization: bearer secret"))[0] == 200
    assert ask(strict, b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 200
    assert ask(strict, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 401


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v2/repository/models/double/unload", "--allow-admin"),
        ("/v2/repository/models/double/load", "--allow-admin"),
        ("/v2/logging", "--allow-admin"),
        ("/v2/systemsharedmemory/unregister", "--allow-shared-memory"),
    ],
)
def test_administration_is_off_unless_allowed(strict: Running, path: str, hint: str) -> None:
    status, message = error_of(ask(strict, post(path, b"{}", "Authorization: Bearer secret")))
    assert (status, hint in message) == (403, True)


def test_running_requests_end_while_the_server_drains() -> None:
    with serving() as running, running.connect() as idle, running.connect() as busy:
        busy.sendall(post("/v2/models/slow/infer"))
        _until(lambda: running.core.started == 1)
        drained = asyncio.run_coroutine_threadsafe(running.frontends.drain(5), running.loop)
        assert idle.recv(1) == b""
        with pytest.raises(OSError, match="refused"):
            running.connect()
        running.do(running.core.release.set)
        status, headers, body = read_reply(busy.makefile("rb"))
        assert (status, headers["connection"]) == (200, "close")
        assert json.loads(body)["outputs"][0]["data"] == [2, 4, 6, 8]
        drained.result(5)


def test_tls_is_spoken_where_there_is_a_certificate(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make, *names], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    with serving(tls=TlsFiles(str(certificate), str(key))) as running:
        with context.wrap_socket(running.connect(), server_hostname="localhost") as secure:
            stream = secure.makefile("rb")
            for padding in (0, 300_000):
                secure.sendall(post(DOUBLE, BODY + b" " * padding))
                assert json.loads(read_reply(stream)[2])["outputs"][0]["data"] == [2, 4, 6, 8]
        with running.connect() as plain:
            plain.sendall(post(DOUBLE))
            with contextlib.suppress(ConnectionResetError):
                assert plain.recv(12) != b"HTTP/1.1 200"


def test_half_a_length_of_text_is_refused(server: Running) -> None:
    entry = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [entry]}).encode()
    raw = post(
        "/v2/models/text/infer", head + struct.pack("<I", 5) + b"abcd", f"Inference-Header-Content-Length: {len(head)}"
    )
    assert error_of(ask(server, raw)) == (400, "input 'x': element 0 claims 5 bytes, 4 are left")


def _until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.mark.parametrize("sent", ["a part of a body", "a whole request"])
def test_the_body_of_a_client_that_went_is_freed_at_once(sent: str) -> None:
    with serving() as server:
        body = bytes(300_000)
        head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        if sent == "a whole request":
            tensor = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
            body = tensor.ljust(len(body))
        gone: list[weakref.ref[object]] = []
        server.do(gc.disable)
        try:
            with server.connect() as client:
                client.sendall(head + (body if sent == "a whole request" else body[:200_000]))
                _until(lambda: server.frontends.http.pending or server.core.started)
                server.do(lambda: gone.extend(weakref.ref(one) for one in server.frontends.http.connections))
            assert gone
            _until(lambda: gone[0]() is None)
        finally:
            gc.enable()
