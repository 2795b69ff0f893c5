"""One HTTP/1.1 connection: bytes to requests, replies to bytes, in order, within limits.

Reads go into one buffer that all connections of the loop share (asyncio's BufferedProtocol fills and hands it over in
one step), so an idle connection holds no memory for them.  A large body is read by the kernel straight into its own
memory, which is aligned so that the first binary tensor in it can be used where it lies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.frontend import check_bearer
from toolchain.runtime.server.http_reply import STATUS_LINES, Reply, error_reply, refusal
from toolchain.runtime.server.http_request import Request, begin, room_for

if TYPE_CHECKING:
    from toolchain.runtime.server.http_server import HttpServer

_log = logging.getLogger("toolchain.serve")
_WANTED = frozenset(
    {
        b"accept-encoding",
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"expect",
        b"host",
        b"inference-header-content-length",
        b"traceparent",
        b"transfer-encoding",
    }
)
#: Larger bodies get memory of their own at once, and count for ``max_pending``.
SMALL_BODY = 32 * 1024
_JOINED = 64 * 1024
_LINGER = 2.0
_IDLE, _HEAD, _BODY, _DISCARD = range(4)


class HttpConnection(asyncio.BufferedProtocol):
    """See the module."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self.parser = httptools.HttpRequestParser(self)
        self.phase = _IDLE
        self.deadline = server.now + server.settings.idle_timeout
        self.stall = 0.0
        self.write_deadline = 0.0
        self.closing = False
        self.task: asyncio.Task[None] | None = None
        self.current: Request | None = None
        self.incoming: Request | None = None
        self.queue: deque[Request] = deque()
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_size = self._head_read = 0
        self._began = False
        self._upgrade = False
        self._room: memoryview | None = None
        self._direct: memoryview | None = None
        self._filled = 0
        self._chunked = False
        self._pumping = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        if not self.server.add(self):
            self._refuse(error_reply(503, "too many connections; try again later", b"Retry-After: 1\r\n"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        if self.task is not None:
            # The client went: the request leaves the queue.  Soon, so that the task has begun and can clean up.
            self.server.loop.call_soon(self.task.cancel)
        for request in (self.incoming, self.current, *self.queue):
            if request is not None:
                self.server.release(request)
        self.queue.clear()
        self.server.remove(self)

    def eof_received(self) -> bool:
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.view if self._direct is None else self._direct

    def buffer_updated(self, nbytes: int) -> None:
        if self._direct is not None:
            self._filled += nbytes
            self.stall = self.server.now + self.server.settings.body_timeout
            self._direct = self._direct[nbytes:]
            if not self._direct:
                self._direct = None
                self.parser = httptools.HttpRequestParser(self)  # the old one still waits for this body
                self.on_message_complete()
            return
        if self.phase == _DISCARD or self.closing:
            return
        self._began = False
        self._feed(self.server.view[:nbytes])
        if self.phase == _HEAD and not self._began:
            # All of it belonged to a head that still goes on, maybe to a header that the parser hasn't told of.
            self._head_read += nbytes
            if self._head_read > self.server.settings.max_head:
                self._too_long()
        if self._room is not None and self.incoming is not None and self.phase == _BODY:
            self._direct = self._room[self._filled :]

    def pause_writing(self) -> None:
        self.write_deadline = self.server.now + self.server.settings.write_timeout

    def resume_writing(self) -> None:
        self.write_deadline = 0.0
        self._pump()

    def _feed(self, data: memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The request is answered without the upgrade; what follows is its body, or another one.
                data = self._body_after_upgrade(data[upgrade.args[0] :])
                self.parser = httptools.HttpRequestParser(self)
                if data and not self.closing and self.phase != _DISCARD:
                    continue
            except httptools.HttpParserError as error:
                if self.phase != _DISCARD:
                    self._refuse(error_reply(400, f"the request is no valid HTTP: {error}"))
            return

    def _body_after_upgrade(self, data: memoryview) -> memoryview:
        """Take the body, of which the parser doesn't know; what is left of ``data``."""
        if not self._upgrade or self._room is None:
            return data
        self._filled = min(len(data), len(self._room))
        self._room[: self._filled] = data[: self._filled]
        self._upgrade = False
        if self._filled == len(self._room):
            self.on_message_complete()
        return data[self._filled :]

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self.phase == _DISCARD:
            return
        self.phase = _HEAD
        self.deadline = self.server.now + self.server.settings.head_timeout
        self._url = b""
        self._headers = {}
        self._head_size = self._head_read = 0
        self._began = True

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > self.server.settings.max_head and self.phase in (_HEAD, _BODY):
            self._too_long()
            return
        if self.phase == _HEAD:  # else a trailer, which nobody asked for
            name = name.lower()
            if name in _WANTED:
                self._headers[name] = value

    def on_headers_complete(self) -> None:
        if self.phase == _DISCARD:
            return
        server, headers = self.server, self._headers
        method = self.parser.get_method()
        route = server.router.resolve(method, self._url)
        request = Request(method, self._url, route, headers)
        request.close = not self.parser.should_keep_alive()
        self.incoming = request
        self._room = None
        self._filled = 0
        self._chunked = self._upgrade = False
        self.phase = _BODY
        try:
            self._check_head(request)
        except ServeError as error:
            self._refuse(refusal(error))

    def _check_head(self, request: Request) -> None:
        """Refuse what needn't be read, and make room for the body.

        Raises:
            ServeError: by the head alone the request can't be answered.
        """
        server, settings, headers = self.server, self.server.settings, request.headers
        if len(request.target) + self._head_size > settings.max_head:
            self._too_long()
            return
        if b"host" not in headers and self.parser.get_http_version() == "1.1":
            raise ServeError(Status.INVALID, "the request has no Host header")
        if settings.authorize is not None and not request.route.open:
            check_bearer(settings, headers.get(b"authorization", b"").decode("latin-1"))
        coding = headers.get(b"transfer-encoding")
        length = int(headers.get(b"content-length", b"0"))
        if coding is not None:
            if coding.strip().lower() != b"chunked":
                raise ServeError(Status.UNSUPPORTED, "of the transfer codings only 'chunked' is supported")
            self._chunked = True
        elif length > request.route.max_body:
            raise ServeError(
                Status.TOO_LARGE, f"the request has {length} bytes, at most {request.route.max_body} are allowed"
            )
        if coding is not None or length:
            self.stall = server.now + settings.body_timeout
            size = length if coding is None else request.route.max_body
            self.deadline = self.stall + size / settings.min_rate
            self._upgrade = self.parser.should_upgrade()
            if self._upgrade and coding is not None:
                raise ServeError(Status.UNSUPPORTED, "a chunked body can't come with an Upgrade header")
            if length > SMALL_BODY or self._upgrade:
                server.reserve(request, length)
                self._room = room_for(length, headers.get(b"inference-header-content-length", b"0"))
        expected = headers.get(b"expect")
        if expected is not None:
            self._expect(expected)

    def _expect(self, expected: bytes) -> None:
        if expected.lower() != b"100-continue":
            self._refuse(error_reply(417, "of the expectations only '100-continue' can be met"))
        elif self.current is None:  # else the answer before this one has to go first, and the client must wait
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        request = self.incoming
        if request is None or self.phase == _DISCARD:
            return
        self.stall = self.server.now + self.server.settings.body_timeout
        if self._room is not None:
            end = self._filled + len(body)
            self._room[self._filled : end] = body
            self._filled = end
        elif not request.body:
            request.body = body
        else:
            collected = bytearray(request.body) if type(request.body) is bytes else request.body
            assert isinstance(collected, bytearray)
            if self._chunked:
                self._grow(request, len(collected) + len(body))
                if self.phase == _DISCARD:
                    return
            collected += body
            request.body = collected

    def _grow(self, request: Request, size: int) -> None:
        """Bound a body of a length that was not announced."""
        try:
            if size > request.route.max_body:
                raise ServeError(Status.TOO_LARGE, f"the request has more than {request.route.max_body} bytes")
            if size > SMALL_BODY:
                self.server.reserve(request, size - request.reserved)
        except ServeError as error:
            self._refuse(refusal(error))

    def on_message_complete(self) -> None:
        request = self.incoming
        if request is None or self.phase == _DISCARD or self._upgrade:
            return
        if self._room is not None:
            request.body = self._room
            self._room = None
        self.incoming = None
        self.phase = _IDLE
        self.deadline = self.server.now + self.server.settings.idle_timeout
        if self.current is None and not self.queue and not self.write_deadline:
            self._run(request)
        else:
            self.queue.append(request)
            self.transport.pause_reading()

    # Answers.

    def _run(self, request: Request) -> None:
        self.current = request
        if self.server.settings.log_request is not None:
            request.started = time.monotonic_ns()
        reply = request.reply
        if reply is None:
            if request.route.waits:
                self.task = begin(self._wait(request), self.server.loop)
                return
            try:
                reply = request.route.answer(request)
            except ServeError as error:
                reply = refusal(error)
            except Exception:
                reply = _broken(request)
        self._send(request, reply)

    async def _wait(self, request: Request) -> None:
        try:
            reply = await request.route.wait(request)
        except ServeError as error:
            reply = refusal(error)
        except Exception:
            reply = _broken(request)
        self.task = None
        self._send(request, reply)

    def _send(self, request: Request, reply: Reply) -> None:
        server = self.server
        status, parts, content_type, headers = reply
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        close = request.close or server.draining
        if close:
            headers += b"Connection: close\r\n"
        head = b"%b%bContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n" % (
            STATUS_LINES[status],
            server.common,
            content_type,
            size,
            headers,
        )
        if request.method == b"HEAD":
            self.transport.write(head)
        elif size <= _JOINED:
            self.transport.write(head + parts[0] if len(parts) == 1 else b"".join([head, *parts]))
        else:
            self.transport.writelines([head, *parts])
        server.counts[status] = server.counts.get(status, 0) + 1
        if request.reserved:
            server.release(request)
        if request.started and server.settings.log_request is not None:
            took = time.monotonic_ns() - request.started
            path = request.target.decode("latin-1")
            server.settings.log_request(request.method.decode("latin-1"), path, status, took)
        self.current = None
        if close:
            self._shut(linger=request.reply is not None)
        elif self.queue:
            self._pump()

    def _pump(self) -> None:
        """Go on with requests that wait for their turn; a loop, for there may be hundreds in one read."""
        if self._pumping:
            return
        self._pumping = True
        while self.queue and self.current is None and not self.closing and not self.write_deadline:
            self._run(self.queue.popleft())
        self._pumping = False
        if not self.queue and not self.closing:
            self.transport.resume_reading()

    def _too_long(self) -> None:
        limit = self.server.settings.max_head
        self._refuse(error_reply(431, f"request line and headers have more than {limit} bytes"))

    def _refuse(self, reply: Reply) -> None:
        """Answer what can't be read on with an error, in its turn, and close."""
        if self.phase == _DISCARD or self.closing:
            return
        request = self.incoming or Request(b"", self._url, self.server.router.nowhere, {})
        self.incoming = None
        self._room = self._direct = None
        self.phase = _DISCARD
        self.deadline = float("inf")
        request.body = b""
        request.reply = reply
        request.close = True
        if self.current is None and not self.queue:
            self._run(request)
        else:
            self.queue.append(request)

    def _shut(self, *, linger: bool) -> None:
        """Close; with ``linger`` what the client still sends is thrown away first, else it may lose the answer."""
        self.closing = not linger
        self.queue.clear()
        self.phase = _DISCARD
        if linger and self.transport.can_write_eof():
            self.deadline = self.server.now + _LINGER
            self.transport.write_eof()
        else:
            self.closing = True
            self.transport.close()

    # What the server calls.

    def tick(self, now: float) -> None:
        """Look for deadlines that have passed."""
        if self.write_deadline:
            if now > self.write_deadline:
                self.transport.abort()
        elif self.phase == _DISCARD:
            if now > self.deadline:
                self.transport.abort()
        elif self.current is not None:
            return
        elif self.phase == _IDLE:
            if now > self.deadline:
                self.close_idle()
        elif self.phase == _HEAD:
            if now > self.deadline:
                self._refuse(error_reply(408, "the request's headers did not come in time"))
        elif now > self.deadline or now > self.stall:
            self._refuse(error_reply(408, "the request's body did not come in time"))

    def close_idle(self) -> None:
        """Close, unless a request is being received or answered."""
        if self.current is None and self.phase == _IDLE and not self.queue:
            self.closing = True
            self.transport.close()


def _broken(request: Request) -> Reply:
    path = request.target.decode("latin-1")
    _log.exception("request failed", extra={"facts": {"path": path}})
    return error_reply(500, "the server failed to answer this request; its log says why")
