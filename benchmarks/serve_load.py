"""One load generator for all servers: connections that each send the same request again as soon as it is answered.

HTTP/1.1 and gRPC (HTTP/2) are written and read here as bytes, on uvloop, so that the generator costs the same few
microseconds whoever answers.  Every answer is checked: its status, the first one's values, the others' length.
"""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import uvloop

_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*(\d+)")
_WINDOW = 1 << 20
_SLACK = 64
_ENOUGH = 8
_PATIENCE = 6
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1


class LoadError(Exception):
    """The server did not answer as it has to."""


@dataclass(frozen=True)
class Load:
    """What one run of the generator found; seconds and counts."""

    requests: int
    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    def percentile(self, share: float) -> float:
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * share))]


class Wire(Protocol):
    """A protocol's requests and answers as bytes."""

    def first(self) -> bytes: ...
    def request(self) -> bytes: ...
    def answered(self, data: bytes) -> tuple[bytes | None, bytes]:
        """The answer that ``data`` completes, or None; and what has to be sent besides."""
        ...


class Http:
    """One HTTP/1.1 request, again and again."""

    def __init__(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._buffer = b""

    def first(self) -> bytes:
        return b""

    def request(self) -> bytes:
        return self._request

    def answered(self, data: bytes) -> tuple[bytes | None, bytes]:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
            return None, b""
        length = _LENGTH.search(buffer, 0, end + 2)
        if length is None:
            raise LoadError(f"an answer without a length: {buffer[:200]!r}")
        if len(buffer) < end + 4 + int(length[1]):
            self._buffer = buffer
            return None, b""
        if buffer[9:12] != b"200":
            raise LoadError(f"not answered with 200: {buffer[:400]!r}")
        self._buffer = b""
        return buffer[end + 4 :], b""


class Grpc:
    """One unary gRPC call, again and again, a stream after the other."""

    def __init__(self, method: str, message: bytes) -> None:
        headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost"}
        headers |= {"te": "trailers", "content-type": "application/grpc"}
        # Literal, not indexed: the same bytes for every stream.
        self._headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        self._body = b"\0" + struct.pack(">I", len(message)) + message
        self._stream = -1
        self._buffer = b""
        self._answer = b""
        self._consumed = 0

    def first(self) -> bytes:
        grown = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW))
        return _PREFACE + _frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, _WINDOW)) + grown

    def request(self) -> bytes:
        self._stream += 2
        head = _frame(_HEADERS, _END_HEADERS, self._stream, self._headers)
        return head + _frame(_DATA, _END_STREAM, self._stream, self._body)

    def answered(self, data: bytes) -> tuple[bytes | None, bytes]:
        buffer = self._buffer + data if self._buffer else data
        answer, send, at = None, b"", 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at < 9 + size:
                break
            kind, flags = buffer[at + 3], buffer[at + 4]
            payload = buffer[at + 9 : at + 9 + size]
            at += 9 + size
            if kind == _DATA:
                self._answer += payload
                self._consumed += size
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                send += _frame(kind, _ACK, 0, payload if kind == _PING else b"")
            elif kind in (_RESET, _GO_AWAY):
                raise LoadError(f"the stream was ended: {payload!r}")
            if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                if not self._answer:
                    raise LoadError("the call failed")
                answer, self._answer = self._answer, b""
        self._buffer = buffer[at:]
        if self._consumed > _WINDOW // 2:
            send += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._consumed))
            self._consumed = 0
        return answer, send


def _text(text: str) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class _Run:
    """What the connections of one run share."""

    def __init__(self, verify: Callable[[bytes], None]) -> None:
        self.verify = verify
        self.length: int | None = None
        self.latencies: list[float] = []
        self.counting = False
        self.stopped = False
        self.error: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def check(self, answer: bytes) -> None:
        """The first answer is verified, the others have its length but for numbers and ids of other lengths."""
        if self.length is None:
            self.verify(answer)
            self.length = len(answer)
        elif abs(len(answer) - self.length) > _SLACK:
            raise LoadError(f"another answer than before: {answer[:200]!r}")


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run, wire: Wire) -> None:
        self._run, self._wire = run, wire
        self._transport: Any = None
        self._sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._wire.first())
        self._send()

    def data_received(self, data: bytes) -> None:
        run = self._run
        try:
            answer, more = self._wire.answered(data)
            if more:
                self._transport.write(more)
            if answer is None:
                return
            run.check(answer)
        except LoadError as error:
            self._fail(error)
            return
        if run.counting:
            run.latencies.append(time.perf_counter() - self._sent)
        if not run.stopped:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.stopped:
            self._fail(LoadError(f"the server closed a connection: {exc}"))

    def close(self) -> None:
        self._transport.abort()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._wire.request())

    def _fail(self, error: LoadError) -> None:
        if not self._run.error.done():
            self._run.error.set_exception(error)


async def _generate(
    port: int,
    wires: list[Wire],
    verify: Callable[[bytes], None],
    warmup: float,
    seconds: float,
    probe: Callable[[], float],
) -> tuple[Load, float]:
    loop = asyncio.get_running_loop()
    run = _Run(verify)
    connections = []
    for wire in wires:
        _, connection = await loop.create_connection(lambda wire=wire: _Connection(run, wire), "127.0.0.1", port)  # type: ignore[misc]
        connections.append(connection)

    async def wait(time_s: float) -> None:
        done, _ = await asyncio.wait({run.error}, timeout=time_s)
        if done:
            run.error.result()

    try:
        await wait(warmup)
        before, started = probe(), time.perf_counter()
        run.counting = True
        await wait(seconds)
        # What is in flight at both ends must not weigh: at least a few requests of each connection.
        end = time.perf_counter() + _PATIENCE * seconds
        while len(run.latencies) < _ENOUGH * len(wires) and time.perf_counter() < end:
            await wait(0.1)
        run.counting = False
        took, after = time.perf_counter() - started, probe()
    finally:
        run.stopped = True
        for connection in connections:
            connection.close()
        if not run.error.done():
            run.error.cancel()
    if not run.latencies:
        raise LoadError(f"no answer within {seconds} s")
    return Load(len(run.latencies), took, sorted(run.latencies)), after - before


def generate(
    port: int,
    wires: list[Wire],
    verify: Callable[[bytes], None],
    warmup: float,
    seconds: float,
    probe: Callable[[], float],
) -> tuple[Load, float]:
    """Run one connection for each of ``wires`` and count after ``warmup`` seconds.

    Args:
        port: on 127.0.0.1.
        wires: the request of each connection.
        verify: raises LoadError where the first answer is wrong.
        warmup: seconds before counting.
        seconds: of counting.
        probe: called at the beginning and the end of the counting.

    Returns:
        What was counted, and the difference of the probes.

    Raises:
        LoadError: an answer was wrong, or none came.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_generate(port, wires, verify, warmup, seconds, probe))
