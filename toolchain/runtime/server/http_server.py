"""The HTTP server: its socket, its connections, their deadlines, and a graceful end."""

from __future__ import annotations

from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

from toolchain.runtime.server.api import Core
from toolchain.runtime.server.http_connection import HttpConnection
from toolchain.runtime.server.http_heads import Heads
from toolchain.runtime.server.http_reply import BINARY, JSON, STATUS_LINES
from toolchain.runtime.server.http_request import Request
from toolchain.runtime.server.listening import Listening
from toolchain.runtime.server.refusals import Refusals
from toolchain.runtime.server.routes import Router

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.shared_memory import SharedMemory

_READ = 64 * 1024


class HttpServer(Listening[HttpConnection]):
    """Serves a core over HTTP/1.1.

    Attributes:
        counts: answers by status.
        common: the headers that every answer has.
        good: an answer of status 200 up to its length, by content type.
        also: other front ends' metrics, which are shown with these.
        heads: those of requests that came before.
    """

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        super().__init__(settings)
        self.router = Router(core, settings, memory, self)
        self.counts: dict[int, int] = {}
        self.common = b""
        self.good: dict[bytes, bytes] = {}
        self.buffer = bytearray(_READ)
        self.view = memoryview(self.buffer)
        self.refusals = Refusals("http")
        self.also: list[Callable[[], bytes]] = []
        self.heads = Heads(self.router, settings.max_head)
        self._memory = memory
        limits = (settings.head_timeout, settings.body_timeout, settings.idle_timeout, settings.write_timeout)
        self._interval = max(0.02, min(1.0, *[limit / 4 for limit in limits]))

    def connection(self) -> HttpConnection:
        return HttpConnection(self)

    async def drain(self, grace: float) -> None:
        """Take no new connections, let running requests end for ``grace`` seconds, then close what is left."""
        await super().drain(grace)
        self._memory.close()

    def reserve(self, request: Request, size: int) -> None:
        """Count bytes that a request's body takes.

        Raises:
            ServeError: UNAVAILABLE, all bodies together would take more than is allowed.
        """
        self.hold(size)
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

    def tick(self) -> float:
        self.common = b"Date: %b\r\n" % formatdate(usegmt=True).encode()
        start = STATUS_LINES[200] + self.common
        self.good = {kind: b"%bContent-Type: %b\r\nContent-Length: " % (start, kind) for kind in (JSON, BINARY)}
        return self._interval
