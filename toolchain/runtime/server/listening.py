"""What the servers of both protocols share: a port, connections up to a limit, bytes held, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from toolchain.runtime.server.api import ServeError, Status

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings

_BACKLOG = 1024
_TLS_TIMEOUT = 10.0
_LOOK = 0.02


class Connection(Protocol):
    """What a server asks of its connections."""

    transport: asyncio.Transport

    def tick(self, now: float) -> None:
        """Look for deadlines that have passed."""

    def go_away(self) -> None:
        """Take no more requests; close when those that run are answered."""


C = TypeVar("C", bound=Connection)


class Listening(Generic[C]):
    """A server's socket and connections.

    Attributes:
        port: where it listens, after :meth:`listen`.
        now: the loop's time in seconds, as of the last tick.
        connections: those that are open.
        pending: bytes of large requests that are held.
        draining: whether no more requests are taken.
    """

    def __init__(self, settings: FrontendSettings) -> None:
        self.settings = settings
        self.port = 0
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()
        self.connections: set[C] = set()
        self.pending = 0
        self.draining = False
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection(self) -> asyncio.Protocol | asyncio.BufferedProtocol:
        """For a client that comes."""
        raise NotImplementedError

    def tick(self) -> float:
        """What is done again and again; seconds until the next time."""
        raise NotImplementedError

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None, reuse_port: bool = False) -> None:
        """Start to answer; port 0 is any that is free.

        Raises:
            OSError: the address can't be listened on.
        """
        self._server = await self.loop.create_server(
            self.connection,
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
        """Take no new requests, let running ones end for ``grace`` seconds, then cut off what is left."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.go_away()
        end = self.loop.time() + grace
        while self.connections and self.loop.time() < end:
            await asyncio.sleep(_LOOK)
        for connection in list(self.connections):
            connection.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)

    def add(self, connection: C) -> bool:
        """Whether there is room for another connection."""
        if len(self.connections) >= self.settings.max_connections:
            return False
        self.connections.add(connection)
        return True

    def remove(self, connection: C) -> None:
        self.connections.discard(connection)

    def hold(self, size: int) -> None:
        """Count bytes of a large request.

        Raises:
            ServeError: UNAVAILABLE, all of them together would take more than is allowed.
        """
        if self.pending + size > self.settings.max_pending:
            raise ServeError(Status.UNAVAILABLE, "too many large requests are being received; try again later", 1.0)
        self.pending += size

    def _tick(self) -> None:
        self.now = self.loop.time()
        wait = self.tick()
        for connection in list(self.connections):
            connection.tick(self.now)
        self._timer = self.loop.call_later(wait, self._tick)
