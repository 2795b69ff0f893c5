"""gRPC's HTTP/2 as bytes: what clients may send however they cut it, and what is refused or bounded."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hpack import Decoder, Encoder

from tests.helpers.serving import Running, serving
from toolchain.runtime.server import h2_frames as h2
from toolchain.runtime.server.frontend import FrontendSettings, TlsFiles
from toolchain.runtime.server.h2_frames import frame, number
from toolchain.runtime.server.proto import stubs

pb = stubs()
METHOD = "/inference.GRPCInferenceService/ModelInfer"
HEADERS = {":method": "POST", ":scheme": "http", ":path": METHOD, ":authority": "a", "te": "trailers"}
HEADERS |= {"content-type": "application/grpc"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FrontendSettings(allow_admin=True), grpc=True) as running:
        yield running


@pytest.fixture
def peer(server: Running) -> Iterator[Peer]:
    with Peer(server) as opened:
        yield opened


class Peer:
    """A client that sends what it is told to."""

    def __init__(self, server: Running, window: int | None = None) -> None:
        port = server.frontends.grpc_port
        assert port is not None
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.buffer = b""
        self.stream = -1
        self.send(h2.PREFACE, h2.settings({} if window is None else {h2.INITIAL_WINDOW_SIZE: window}))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def head(self, changes: Mapping[str, str] | None = None) -> bytes:
        """The next stream's HEADERS frame."""
        self.stream += 2
        headers = HEADERS | dict(changes or {})
        return frame(h2.HEADERS, h2.END_HEADERS, self.stream, self.encoder.encode(headers.items()))

    def data(self, payload: bytes, flags: int = h2.END_STREAM) -> bytes:
        return frame(h2.DATA, flags, self.stream, payload)

    def next(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream and payload of the next frame; EOFError where the connection has ended."""
        while len(self.buffer) < 9 or len(self.buffer) < 9 + int.from_bytes(self.buffer[:3], "big"):
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError
            self.buffer += more
        size = int.from_bytes(self.buffer[:3], "big")
        whole, self.buffer = self.buffer[: 9 + size], self.buffer[9 + size :]
        return whole[3], whole[4], int.from_bytes(whole[5:9], "big"), whole[9:]

    def until(self, kind: int) -> tuple[int, int, bytes]:
        while True:
            found, flags, stream, payload = self.next()
            if found == kind:
                return flags, stream, payload

    def answer(self, stream: int | None = None) -> tuple[dict[str, str], bytes]:
        """Trailers and data of a stream's answer."""
        stream, data, headers = stream or self.stream, b"", dict[str, str]()
        while True:
            kind, flags, number_, payload = self.next()
            if kind == h2.HEADERS:
                found = {str(k): str(v) for k, v in self.decoder.decode(payload)}
                if number_ == stream:
                    headers |= found
            elif kind == h2.DATA and number_ == stream:
                data += payload
            if number_ == stream and flags & h2.END_STREAM:
                return headers, data


def message(values: np.ndarray, model: str = "double", coding: Callable[[bytes], bytes] | None = None) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=values.shape)
    request.raw_input_contents.append(values.tobytes())
    data = request.SerializeToString()
    packed = coding(data) if coding else data
    return bytes([coding is not None]) + len(packed).to_bytes(4, "big") + packed


def doubled(answer: tuple[dict[str, str], bytes], values: np.ndarray) -> bool:
    headers, data = answer
    assert headers["grpc-status"] == "0", headers
    assert int.from_bytes(data[1:5], "big") == len(data) - 5
    raw = pb.ModelInferResponse.FromString(data[5:]).raw_output_contents[0]
    return bool(raw == (values * 2).tobytes())


ONE = np.arange(4, dtype=np.float32).reshape(1, 4)
LARGE = np.arange(400_000, dtype=np.float32).reshape(-1, 4)


def test_a_request_may_be_cut_anywhere(peer: Peer) -> None:
    request = peer.head() + peer.data(message(ONE))
    for byte in request:
        peer.send(bytes([byte]))
    assert doubled(peer.answer(), ONE)
    body = message(ONE)
    peer.send(peer.head(), *[peer.data(body[i : i + 1], 0) for i in range(len(body))], peer.data(b""))
    assert doubled(peer.answer(), ONE)


def test_headers_may_be_continued_padded_and_prioritized(peer: Peer) -> None:
    whole = peer.head()
    block = whole[9:]
    flags = h2.PADDED | h2.PRIORITIZED
    first = frame(h2.HEADERS, flags, peer.stream, bytes([3]) + bytes(5) + block[:4] + bytes(3))
    rest = [frame(h2.CONTINUATION, 0, peer.stream, block[4:20])]
    rest.append(frame(h2.CONTINUATION, h2.END_HEADERS, peer.stream, block[20:]))
    padded = bytes([7]) + message(ONE) + bytes(7)
    peer.send(first, *rest, frame(h2.DATA, h2.PADDED | h2.END_STREAM, peer.stream, padded))
    assert doubled(peer.answer(), ONE)


def test_repeated_headers_mean_the_same_while_the_table_changes(peer: Peer) -> None:
    for round_ in range(6):
        for _ in range(3):
            peer.send(peer.head(), peer.data(message(ONE)))
            assert doubled(peer.answer(), ONE)
        # Entries of the table move: the same bytes would mean something else.
        peer.send(peer.head({"x-other": f"{round_}" * 50}), peer.data(message(ONE)))
        assert doubled(peer.answer(), ONE)
        peer.send(peer.head({":path": f"/nowhere/{round_}"}), peer.data(message(ONE)))
        assert peer.answer()[0]["grpc-status"] == "12"


def test_answers_wait_for_the_clients_windows(server: Running) -> None:
    with Peer(server, window=10) as peer:
        peer.send(peer.head(), peer.data(message(ONE)))
        assert len(peer.until(h2.DATA)[2]) == 10
        peer.send(frame(h2.PING, 0, 0, b"12345678"))
        assert peer.until(h2.PING)[2] == b"12345678", "no more data before the ping's answer"
        peer.send(frame(h2.WINDOW_UPDATE, 0, peer.stream, number(1000)))
        headers, rest = peer.answer()
        assert headers["grpc-status"] == "0"
        assert rest.endswith((ONE * 2).tobytes())


def test_large_messages_go_both_ways(server: Running) -> None:
    with grpc.insecure_channel(server.grpc, options=[("grpc.max_receive_message_length", -1)]) as channel:
        for coding in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            stub = channel.unary_unary(METHOD, None, pb.ModelInferResponse.FromString)
            answer = stub(message(LARGE)[5:], timeout=20, compression=coding)
            assert answer.raw_output_contents[0] == (LARGE * 2).tobytes()
    assert server.frontends.grpc is not None
    assert server.frontends.grpc.pending == 0


def test_a_bomb_is_refused_before_it_unfolds() -> None:
    with serving(FrontendSettings(max_body=100_000), grpc=True) as running, Peer(running) as peer:
        zeros = message(np.zeros((100_000, 4), np.float32), coding=gzip.compress)
        peer.send(peer.head({"grpc-encoding": "gzip"}), peer.data(zeros))
        assert peer.answer()[0]["grpc-status"] == "8"
        peer.send(peer.head({"grpc-encoding": "gzip"}), peer.data(message(ONE, coding=gzip.compress)))
        assert doubled(peer.answer(), ONE)


@pytest.mark.parametrize(
    ("changes", "body", "status"),
    [
        ({":method": "GET"}, b"", "3"),
        ({"content-type": "text/plain"}, b"", "3"),
        ({":path": "/a/b"}, message(ONE), "12"),
        ({"grpc-encoding": "br"}, message(ONE), "12"),
        ({"grpc-timeout": "soon"}, message(ONE), "3"),
        ({}, b"", "3"),
        ({}, message(ONE)[:-1], "3"),
        ({}, message(ONE) * 2, "3"),
        ({}, b"\1" + message(ONE)[1:], "13"),
        ({}, b"\0\xff\xff\xff\xff", "8"),
        ({}, b"\0\0\0\0\2\xff\xff", "3"),
    ],
)
def test_a_call_that_can_not_be_answered_ends_alone(peer: Peer, changes: Any, body: bytes, status: str) -> None:
    peer.send(peer.head(changes), peer.data(body))
    assert peer.answer()[0]["grpc-status"] == status
    peer.send(peer.head(), peer.data(message(ONE)))
    assert doubled(peer.answer(), ONE)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(30),
        h2.PREFACE + frame(h2.DATA, 0, 1, b"x"),
        h2.PREFACE + frame(h2.HEADERS, h2.END_HEADERS, 2, b"\x88"),
        h2.PREFACE + frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        h2.PREFACE + frame(h2.HEADERS, 0, 1, b"\x88") + frame(h2.PING, 0, 0, bytes(8)),
        h2.PREFACE + frame(h2.HEADERS, 0, 1, b"") + frame(h2.CONTINUATION, 0, 1, b"\0" * 16000) * 9,
        h2.PREFACE + frame(h2.CONTINUATION, 0, 1, b""),
        h2.PREFACE + b"\xff\xff\xff" + bytes(6),
        h2.PREFACE + frame(h2.SETTINGS, 0, 0, b"12345"),
        h2.PREFACE + frame(h2.WINDOW_UPDATE, 0, 0, number(0)),
        h2.PREFACE + frame(h2.WINDOW_UPDATE, 0, 0, number(2**31 - 1)),
        h2.PREFACE + frame(h2.PUSH_PROMISE, 0, 1, bytes(4)),
        h2.PREFACE + frame(h2.HEADERS, h2.PADDED | h2.END_HEADERS, 1, b"\x05\x88"),
        h2.PREFACE + frame(h2.PING, 0, 0, bytes(8)) * 6000,
        h2.PREFACE + frame(h2.RST_STREAM, 0, 1, bytes(4)) * 1500,
    ],
)
def test_who_breaks_the_protocol_is_told_and_cut_off(server: Running, sent: bytes) -> None:
    with Peer(server) as peer:
        peer.socket.close()
        assert server.frontends.grpc_port is not None
        peer.socket = socket.create_connection(("127.0.0.1", server.frontends.grpc_port), timeout=10)
        peer.send(sent)
        assert int.from_bytes(peer.until(h2.GOAWAY)[2][4:8], "big") != h2.NO_ERROR
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.until(h2.GOAWAY)


def test_who_sends_more_than_it_was_asked_for_is_cut_off(server: Running, peer: Peer) -> None:
    """A stream's requests wait for the model; who goes on sending all the same can't fill the server's memory."""
    path = {":path": METHOD.replace("ModelInfer", "ModelStreamInfer")}
    peer.send(peer.head(path))
    part = peer.data(message(np.zeros((1000, 4), np.float32), "slow"), 0)
    with contextlib.suppress(OSError):
        peer.send(*[part] * 400)
    assert int.from_bytes(peer.until(h2.GOAWAY)[2][4:8], "big") == h2.FLOW_CONTROL_ERROR
    _until(lambda: server.core.started == server.core.cancelled)


def test_no_random_bytes_harm_the_server(server: Running) -> None:
    rng = random.Random(7)
    for _ in range(60):
        with Peer(server) as peer:
            good = peer.head() + peer.data(message(ONE))
            bad = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            peer.send(bytes(bad[: rng.randrange(1, len(bad) + 1)]))
    with Peer(server) as peer:
        peer.send(peer.head(), peer.data(message(ONE)))
        assert doubled(peer.answer(), ONE)
    assert server.frontends.grpc is not None
    _until(lambda: not server.frontends.grpc.connections)  # type: ignore[union-attr]
    assert server.frontends.grpc.pending == 0


def test_a_deadline_ends_the_call_and_what_runs_for_it(server: Running, peer: Peer) -> None:
    before = server.core.cancelled
    peer.send(peer.head({"grpc-timeout": "100m"}), peer.data(message(ONE, "slow")))
    assert peer.answer()[0]["grpc-status"] == "4"
    _until(lambda: server.core.cancelled > before)
    peer.send(peer.head(), peer.data(message(ONE, "slow")))
    _until(lambda: server.core.started > server.core.cancelled)
    peer.send(frame(h2.RST_STREAM, 0, peer.stream, number(h2.CANCEL)))
    _until(lambda: server.core.started == server.core.cancelled)


@pytest.mark.parametrize("timeout", ["99999999H", "99999999m", "20S", "1M"])
def test_a_deadline_that_is_far_away_changes_nothing(peer: Peer, timeout: str) -> None:
    peer.send(peer.head({"grpc-timeout": timeout}), peer.data(message(ONE)))
    assert doubled(peer.answer(), ONE)


def test_a_message_that_does_not_come_is_given_up() -> None:
    slow = FrontendSettings(body_timeout=0.3, head_timeout=0.3)
    with serving(slow, grpc=True) as running:
        with Peer(running) as peer:
            peer.send(peer.head(), peer.data(message(ONE)[:7], 0))
            assert peer.answer()[0]["grpc-status"] == "4"
        with Peer(running) as peer:
            peer.send(peer.head()[:20])
            with pytest.raises((EOFError, ConnectionResetError)):
                peer.until(h2.GOAWAY)


def test_the_health_of_a_model_can_be_watched(server: Running) -> None:
    response = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        changes = stub.Watch(health_pb2.HealthCheckRequest(service="text"), timeout=20)
        assert next(changes).status == response.SERVING
        server.do(lambda: server.core.unloaded.add("text"))
        assert next(changes).status == response.NOT_SERVING
        server.do(lambda: server.core.unloaded.discard("text"))
        assert next(changes).status == response.SERVING
        changes.cancel()
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=20)
        assert next(unknown).status == response.SERVICE_UNKNOWN
        unknown.cancel()
        assert stub.List(health_pb2.HealthListRequest(), timeout=5).statuses["text"].status == response.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_running_calls_end_while_the_server_drains() -> None:
    with serving(FrontendSettings(), grpc=True) as running, Peer(running) as peer:
        peer.send(peer.head(), peer.data(message(ONE, "slow")))
        _until(lambda: running.core.started > 0)
        draining = asyncio.run_coroutine_threadsafe(running.frontends.drain(10), running.loop)
        assert int.from_bytes(peer.until(h2.GOAWAY)[2][4:8], "big") == h2.NO_ERROR
        first = peer.stream
        peer.send(peer.head(), peer.data(message(ONE)))
        assert int.from_bytes(peer.until(h2.RST_STREAM)[2], "big") == h2.REFUSED_STREAM
        running.do(running.core.release.set)
        assert doubled(peer.answer(first), ONE)
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.until(h2.GOAWAY)
        draining.result(10)


def test_tls_is_spoken_where_there_is_a_certificate(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make, *names], check=True, capture_output=True)
    with serving(tls=TlsFiles(str(certificate), str(key)), grpc=True) as running:
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.secure_channel(f"localhost:{running.frontends.grpc_port}", trusted, options) as channel:
            stub = channel.unary_unary(METHOD, None, pb.ModelInferResponse.FromString)
            for values in (ONE, LARGE):
                assert stub(message(values)[5:], timeout=20).raw_output_contents[0] == (values * 2).tobytes()
        with Peer(running) as plain:
            plain.send(plain.head(), plain.data(message(ONE)))
            with pytest.raises((EOFError, OSError)):
                plain.until(h2.DATA)


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with serving(FrontendSettings(write_timeout=0.3), grpc=True) as running, Peer(running, window=2**31 - 1) as peer:
        peer.send(frame(h2.WINDOW_UPDATE, 0, 0, number(2**30)))
        body = message(LARGE[:50_000])  # within the window of its stream
        with contextlib.suppress(OSError):
            for _ in range(40):
                peer.send(peer.head(), *[peer.data(body[at : at + 16_000], 0) for at in range(0, len(body), 16_000)])
                peer.send(peer.data(b""))
        assert running.frontends.grpc is not None
        _until(lambda: not running.frontends.grpc.connections, 10)  # type: ignore[union-attr]
        assert running.frontends.grpc.pending == 0


def _until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
