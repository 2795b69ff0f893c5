"""One HTTP/1.1 connection: bytes to requests, replies to bytes, in order, within limits.

Reads go into one buffer that all connections of the loop share (asyncio's BufferedProtocol fills and hands it over in
one step), so an idle connection holds no memory for them.  A large body is read by the kernel straight into its own
memory, which is aligned so that the first binary tensor in it can be used where it lies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.frontend import check_bearer
from toolchain.runtime.server.http_answering import BODY, DISCARD, HEAD, IDLE
from toolchain.runtime.server.http_quick import SMALL_BODY, QuickAnswering
from toolchain.runtime.server.http_reply import Reply, error_reply, refusal
from toolchain.runtime.server.http_request import WANTED, Request, room_for

if TYPE_CHECKING:
    from toolchain.runtime.server.http_server import HttpServer


class HttpConnection(QuickAnswering, asyncio.BufferedProtocol):
    """See the module."""

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server)
        self.parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_size = self._head_read = 0
        self._began = False
        self._upgrade = False
        self._chunked = False

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
        # The parser and this are a cycle, and bodies are large: nothing waits for the garbage collector.
        self.task = self.incoming = self.current = self._room = self._direct = None
        del self.parser

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
        if self.phase == DISCARD or self.closing:
            return
        if self.phase == IDLE and self.take_known(nbytes):
            return
        self._began = False
        self._feed(self.server.view[:nbytes])
        if self.phase == HEAD and not self._began:
            # All of it belonged to a head that still goes on, maybe to a header that the parser hasn't told of.
            self._head_read += nbytes
            if self._head_read > self.server.settings.max_head:
                self._too_long()
        if self._room is not None and self.incoming is not None and self.phase == BODY:
            self._direct = self._room[self._filled :]

    def _feed(self, data: memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The request is answered without the upgrade; what follows is its body, or another one.
                data = self._body_after_upgrade(data[upgrade.args[0] :])
                self.parser = httptools.HttpRequestParser(self)
                if data and not self.closing and self.phase != DISCARD:
                    continue
            except httptools.HttpParserError as error:
                if self.phase != DISCARD:
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
        if self.phase == DISCARD:
            return
        self.phase = HEAD
        self.deadline = self.server.now + self.server.settings.head_timeout
        self._url = b""
        self._headers = {}
        self._head_size = self._head_read = 0
        self._began = True

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > self.server.settings.max_head and self.phase in (HEAD, BODY):
            self._too_long()
            return
        if self.phase == HEAD:  # else a trailer, which nobody asked for
            name = name.lower()
            if name in WANTED:
                self._headers[name] = value

    def on_headers_complete(self) -> None:
        if self.phase == DISCARD:
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
        self.phase = BODY
        try:
            self._check_head(request)
        except ServeError as error:
            self._refuse(refusal(error))

    def _check_head(self, request: Request) -> None:
        """Refuse what needn't be read, and make room for the body.

        Raises:
            ServeError: by the head alone the request can't be answered.
        """
        settings, headers = self.server.settings, request.headers
        if len(request.target) + self._head_size > settings.max_head:
            self._too_long()
            return
        if b"host" not in headers and self.parser.get_http_version() == "1.1":
            raise ServeError(Status.INVALID, "the request has no Host header")
        if settings.authorize is not None and not request.route.open:
            check_bearer(settings, headers.get(b"authorization", b"").decode("latin-1"))
        coding = headers.get(b"transfer-encoding")
        length = int(headers.get(b"content-length", b"0"))
        if coding is not None or length:
            self._make_room(request, coding, length)
        expected = headers.get(b"expect")
        if expected is not None:
            self._expect(expected)

    def _make_room(self, request: Request, coding: bytes | None, length: int) -> None:
        """Say how long the body may take, and make room for it.

        Raises:
            ServeError: it is too large, or comes in a way that is not supported.
        """
        server, limit = self.server, request.route.max_body
        if coding is not None:
            if coding.strip().lower() != b"chunked":
                raise ServeError(Status.UNSUPPORTED, "of the transfer codings only 'chunked' is supported")
            self._chunked = True
        elif length > limit:
            raise ServeError(Status.TOO_LARGE, f"the request has {length} bytes, at most {limit} are allowed")
        self.stall = server.now + server.settings.body_timeout
        self.deadline = self.stall + (limit if self._chunked else length) / server.settings.min_rate
        self._upgrade = self.parser.should_upgrade()
        if self._upgrade and self._chunked:
            raise ServeError(Status.UNSUPPORTED, "a chunked body can't come with an Upgrade header")
        if length > SMALL_BODY or self._upgrade:
            server.reserve(request, length)
            self._room = room_for(length, request.headers.get(b"inference-header-content-length", b"0"))

    def _expect(self, expected: bytes) -> None:
        if expected.lower() != b"100-continue":
            self._refuse(error_reply(417, "of the expectations only '100-continue' can be met"))
        elif self.current is None:  # else the answer before this one has to go first, and the client must wait
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        request = self.incoming
        if request is None or self.phase == DISCARD:
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
                if self.phase == DISCARD:
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
        if request is None or self.phase == DISCARD or self._upgrade:
            return
        if self._room is not None:
            request.body = self._room
            self._room = None
        self.complete(request)

    def _too_long(self) -> None:
        limit = self.server.settings.max_head
        self._refuse(error_reply(431, f"request line and headers have more than {limit} bytes"))

    def _refuse(self, reply: Reply) -> None:
        """Answer what can't be read on with an error, in its turn, and close."""
        if self.phase == DISCARD or self.closing:
            return
        request = self.incoming or Request(b"", self._url, self.server.router.nowhere, {})
        self.incoming = None
        self._room = self._direct = None
        self.phase = DISCARD
        self.deadline = float("inf")
        request.body = b""
        request.reply = reply
        request.close = True
        if self.current is None and not self.queue:
            self.run(request)
        else:
            self.queue.append(request)

    # What the server calls.

    def tick(self, now: float) -> None:
        """Look for deadlines that have passed."""
        if self.write_deadline:
            if now > self.write_deadline:
                self.transport.abort()
        elif self.phase == DISCARD:
            if now > self.deadline:
                self.transport.abort()
        elif self.current is not None:
            return
        elif self.phase == IDLE:
            if now > self.deadline:
                self.go_away()
        elif self.phase == HEAD:
            if now > self.deadline:
                self._refuse(error_reply(408, "the request's headers did not come in time"))
        elif now > self.deadline or now > self.stall:
            self._refuse(error_reply(408, "the request's body did not come in time"))

    def go_away(self) -> None:
        """Close, unless a request is being received or answered."""
        if self.current is None and self.phase == IDLE and not self.queue:
            self.closing = True
            self.transport.close()
