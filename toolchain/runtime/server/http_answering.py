"""The answering side of an HTTP connection: one request after the other, in the order in which they came."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import orjson

from toolchain.runtime.server.api import ServeError
from toolchain.runtime.server.http_reply import STATUS_LINES, Reply, error_reply, refusal
from toolchain.runtime.server.http_request import Request, begin

if TYPE_CHECKING:
    from toolchain.runtime.server.http_server import HttpServer

_log = logging.getLogger("toolchain.serve")
#: Smaller answers are sent in one piece.
JOINED = 64 * 1024
_LINGER = 2.0
#: What a connection receives: nothing yet, a head, a body, or what is thrown away.
IDLE, HEAD, BODY, DISCARD = range(4)


class Answering:
    """What answers the requests of one connection.

    Attributes:
        phase: see :data:`IDLE` and the others.
        deadline: the server's time at which ``phase`` has lasted too long.
        current: the request that is being answered.
        queue: complete requests that wait for their turn.
        task: what answers ``current``, if that takes time.
        write_deadline: when the client must have read what was sent; 0 where it keeps up.
        closing: nothing more is received or answered.
    """

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self.phase = IDLE
        self.deadline = server.now + server.settings.idle_timeout
        self.write_deadline = 0.0
        self.closing = False
        self.task: asyncio.Task[None] | None = None
        self.current: Request | None = None
        self.queue: deque[Request] = deque()
        self._pumping = False

    def pause_writing(self) -> None:
        self.write_deadline = self.server.now + self.server.settings.write_timeout

    def resume_writing(self) -> None:
        self.write_deadline = 0.0
        self._pump()

    def run(self, request: Request) -> None:
        self.current = request
        if self.server.settings.log_request is not None:
            request.started = time.monotonic_ns()
        reply = request.reply
        if reply is None:
            if request.route.waits:
                self.task = begin(self.wait(request, request.route.wait(request)), self.server.loop)
                return
            try:
                reply = request.route.answer(request)
            except ServeError as error:
                reply = refusal(error)
            except Exception:
                reply = _broken(request)
        self._send(request, reply)

    async def wait(self, request: Request, answer: Awaitable[Reply]) -> None:
        """Send what ``answer`` gives."""
        try:
            reply = await answer
        except ServeError as error:
            reply = refusal(error)
        except Exception:
            reply = _broken(request)
        self.task = None
        self._send(request, reply)

    def _send(self, request: Request, reply: Reply) -> None:
        server = self.server
        status, parts, content_type, headers, logged = reply
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        close = request.close or server.draining
        if close:
            headers += b"Connection: close\r\n"
        start = server.good.get(content_type) if status == 200 else None
        if start is None:
            start = b"%b%bContent-Type: %b\r\nContent-Length: " % (STATUS_LINES[status], server.common, content_type)
        head = b"%b%d\r\n%b\r\n" % (start, size, headers)
        if request.method == b"HEAD":
            self.transport.write(head)
        elif size <= JOINED:
            self.transport.write(head + parts[0] if len(parts) == 1 else b"".join([head, *parts]))
        else:
            self.transport.writelines([head, *parts])
        server.counts[status] = server.counts.get(status, 0) + 1
        if status >= 400 and not logged:
            self._log_refused(request, status, parts[0])
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

    def _log_refused(self, request: Request, status: int, body: bytes | memoryview) -> None:
        """Log an error, unless it is what probes ask for: a health that is bad."""
        refusals = self.server.refusals
        if (request.route.open and status == 503) or not refusals.allows():
            return
        what = f"{request.method.decode('latin-1')} {request.target.decode('latin-1')}".strip()
        refusals.note(what, status, str(orjson.loads(body).get("error", "")))

    def _pump(self) -> None:
        """Go on with requests that wait for their turn; a loop, for there may be hundreds in one read."""
        if self._pumping:
            return
        self._pumping = True
        while self.queue and self.current is None and not self.closing and not self.write_deadline:
            self.run(self.queue.popleft())
        self._pumping = False
        if not self.queue and not self.closing:
            self.transport.resume_reading()

    def _shut(self, *, linger: bool) -> None:
        """Close; with ``linger`` what the client still sends is thrown away first, else it may lose the answer."""
        self.closing = not linger
        self.queue.clear()
        self.phase = DISCARD
        if linger and self.transport.can_write_eof():
            self.deadline = self.server.now + _LINGER
            self.transport.write_eof()
        else:
            self.closing = True
            self.transport.close()


def _broken(request: Request) -> Reply:
    path = request.target.decode("latin-1")
    _log.exception("request failed", extra={"facts": {"path": path}})
    reply = error_reply(500, "the server failed to answer this request; its log says why")
    return reply._replace(logged=True)
