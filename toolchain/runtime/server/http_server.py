"""The HTTP server: its socket, its connections, their deadlines, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

from toolchain.runtime.server.api import Core, ServeError, Status
from toolchain.runtime.server.http_connection import HttpConnection
from toolchain.runtime.server.http_heads import Heads
from toolchain.runtime.server.http_reply import BINARY, JSON, STATUS_LINES
from toolchain.runtime.server.http_request import Request
from toolchain.runtime.server.refusals import Refusals
from toolchain.runtime.server.routes import Router

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.shared_memory import SharedMemory

_READ = 64 * 1024
_BACKLOG = 1024
_TLS_TIMEOUT = 10.0


class HttpServer:
    """Serves a core over HTTP/1.1.

    Attributes:
        port: where it listens, after :meth:`listen`.
        counts: answers by status.
        now: the loop's time in seconds, as of the last tick.
        common: the headers that every answer has.
        good: an answer of status 200 up to its length, by content type.
        also: other front ends' metrics, which are shown with these.
        heads: those of requests that came before.
        draining: whether every answer closes its connection.
    """

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        self.settings = settings
        self.router = Router(core, settings, memory, self)
        self.port = 0
        self.counts: dict[int, int] = {}
        self.connections: set[HttpConnection] = set()
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()
        self.common = b""
        self.good: dict[bytes, bytes] = {}
        self.draining = False
        self.buffer = bytearray(_READ)
        self.view = memoryview(self.buffer)
        self.refusals = Refusals("http")
        self.also: list[Callable[[], bytes]] = []
        self.heads = Heads(self.router, settings.max_head)
        self.pending = 0
        self._server: asyncio.Server | None = None
        self._memory = memory
        limits = (settings.head_timeout, settings.body_timeout, settings.idle_timeout, settings.write_timeout)
        self._interval = max(0.02, min(1.0, *[limit / 4 for limit in limits]))
        self._timer: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None, reuse_port: bool = False) -> None:
        """Start to answer; port 0 is any that is free.

        Raises:
            OSError: the address can't be listened on.
        """
        self._server = await self.loop.create_server(
            lambda: HttpConnection(self),
            host,
            port,
            ssl=tls,
            backlog=_BACKLOG,
            reuse_port=reuse_port or None,
            ssl_handshake_timeout=_TLS_TIMEOUT if tls else None,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._tick()

    async def drain(self, grace: float) -> None:
        """Take no new connections, let running requests end for ``grace`` seconds, then close what is left."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_idle()
        end = self.loop.time() + grace
        while self.connections and self.loop.time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        self._memory.close()
        if self._server is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)

    def add(self, connection: HttpConnection) -> bool:
        """Whether there is room for another connection."""
        if len(self.connections) >= self.settings.max_connections:
            return False
        self.connections.add(connection)
        return True

    def remove(self, connection: HttpConnection) -> None:
        self.connections.discard(connection)

    def reserve(self, request: Request, size: int) -> None:
        """Count bytes that a request's body takes.

        Raises:
            ServeError: UNAVAILABLE, all bodies together would take more than is allowed.
        """
        if self.pending + size > self.settings.max_pending:
            raise ServeError(Status.UNAVAILABLE, "too many large requests are being received; try again later", 1.0)
        self.pending += size
        request.reserved += size

    def release(self, request: Request) -> None:
        """The request's body is no longer held."""
        self.pending -= request.reserved
        request.reserved = 0

    def metrics(self) -> bytes:
        """What the core can't know, as Prometheus text."""
        lines = [
            "# HELP toolchain_http_connections HTTP connections that are open.",
            "# TYPE toolchain_http_connections gauge",
            f"toolchain_http_connections {len(self.connections)}",
            "# HELP toolchain_http_pending_bytes Bytes of large request bodies that are held.",
            "# TYPE toolchain_http_pending_bytes gauge",
            f"toolchain_http_pending_bytes {self.pending}",
            "# HELP toolchain_http_answers_total HTTP answers by status.",
            "# TYPE toolchain_http_answers_total counter",
            *[f'toolchain_http_answers_total{{status="{s}"}} {n}' for s, n in sorted(self.counts.items())],
        ]
        return b"".join([("\n".join(lines) + "\n").encode(), *[metrics() for metrics in self.also]])

    def _tick(self) -> None:
        self.now = self.loop.time()
        self.common = b"Date: %b\r\n" % formatdate(usegmt=True).encode()
        start = STATUS_LINES[200] + self.common
        self.good = {kind: b"%bContent-Type: %b\r\nContent-Length: " % (start, kind) for kind in (JSON, BINARY)}
        for connection in list(self.connections):
            connection.tick(self.now)
        self._timer = self.loop.call_later(self._interval, self._tick)
