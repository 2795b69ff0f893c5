"""The gRPC server: its port, connections, limits, health service and graceful end.

It speaks gRPC over its own HTTP/2 (:mod:`h2_connection`) on the server's loop: what ``grpcio`` does for a call on its
own threads and in its own queues costs several times what everything else here does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

from toolchain.runtime.server.api import Core, ServeError, Status
from toolchain.runtime.server.grpc_connection import GrpcConnection
from toolchain.runtime.server.grpc_health import Health
from toolchain.runtime.server.grpc_service import InferenceService
from toolchain.runtime.server.h2_connection import Http2Connection
from toolchain.runtime.server.refusals import Refusals

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings, TlsFiles
    from toolchain.runtime.server.shared_memory import SharedMemory

_SERVICE = "inference.GRPCInferenceService"
_HEALTH_INTERVAL = 0.5
_BACKLOG = 1024
_TLS_TIMEOUT = 10.0


class GrpcServer:
    """Serves a core over gRPC.

    Attributes:
        port: where it listens, after :meth:`listen`.
        methods: by path.
        now: the loop's time in seconds, as of the last tick.
        counts: answers by code.
        draining: whether no more calls are taken.
    """

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        self.port = 0
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()
        self.draining = False
        self.connections: set[Http2Connection] = set()
        self.pending = 0
        self.counts: dict[str, int] = {}
        self.refusals = Refusals("grpc")
        self._core = core
        self._health = Health()
        self.methods = {**InferenceService(core, settings, memory, self.refused).methods(), **self._health.methods()}
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, tls: TlsFiles | None = None, reuse_port: bool = False) -> None:
        """Start to answer; port 0 is any that is free.

        Raises:
            OSError: the address can't be listened on.
        """
        context: ssl.SSLContext | None = None
        if tls is not None:
            context = tls.context()
            context.set_alpn_protocols(["h2"])
        self._server = await self.loop.create_server(
            lambda: GrpcConnection(self),
            host,
            port,
            ssl=context,
            backlog=_BACKLOG,
            reuse_port=reuse_port or None,
            ssl_handshake_timeout=_TLS_TIMEOUT if tls else None,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._tick()

    async def drain(self, grace: float) -> None:
        """Take no new calls, let running ones end for ``grace`` seconds, then cancel what is left."""
        self._health.set(dict.fromkeys(self._states(), False))
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.go_away()
        end = self.loop.time() + grace
        while self.connections and self.loop.time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)

    def add(self, connection: Http2Connection) -> bool:
        """Whether there is room for another connection."""
        if len(self.connections) >= self.settings.max_connections or self.draining:
            return False
        self.connections.add(connection)
        return True

    def remove(self, connection: Http2Connection) -> None:
        self.connections.discard(connection)

    def reserve(self, size: int) -> None:
        """Count bytes that a message takes.

        Raises:
            ServeError: UNAVAILABLE, all messages together would take more than is allowed.
        """
        if self.pending + size > self.settings.max_pending:
            raise ServeError(Status.UNAVAILABLE, "too many large requests are being received; try again later", 1.0)
        self.pending += size

    def release(self, size: int) -> None:
        """A message is no longer held."""
        self.pending -= size

    def refused(self, what: str, error: ServeError) -> None:
        """Count and log a call that was answered with an error."""
        code = error.status.value[1]
        self.counts[code] = self.counts.get(code, 0) + 1
        if not error.logged and self.refusals.allows():
            error.logged = True
            self.refusals.note(what, code, error.message)

    def metrics(self) -> bytes:
        """What the core can't know, as Prometheus text."""
        lines = [
            "# HELP toolchain_grpc_connections gRPC connections that are open.",
            "# TYPE toolchain_grpc_connections gauge",
            f"toolchain_grpc_connections {len(self.connections)}",
            "# HELP toolchain_grpc_pending_bytes Bytes of large messages that are held.",
            "# TYPE toolchain_grpc_pending_bytes gauge",
            f"toolchain_grpc_pending_bytes {self.pending}",
            "# HELP toolchain_grpc_answers_total Answers to gRPC calls, and to requests of a stream, by code.",
            "# TYPE toolchain_grpc_answers_total counter",
            *[f'toolchain_grpc_answers_total{{code="{code}"}} {n}' for code, n in sorted(self.counts.items())],
        ]
        return ("\n".join(lines) + "\n").encode()

    def _tick(self) -> None:
        self.now = self.loop.time()
        if not self.draining:
            self._health.set(self._states())
        for connection in list(self.connections):
            connection.tick(self.now)
        self._timer = self.loop.call_later(_HEALTH_INTERVAL, self._tick)

    def _states(self) -> dict[str, bool]:
        """The server as "" and as the service's name, and each model by its name."""
        states = dict.fromkeys(("", _SERVICE), self._core.ready())
        for name in {entry.name for entry in self._core.index()} - set(states):
            try:
                states[name] = self._core.model_ready(name)
            except ServeError:
                states[name] = False
        return states
