"""The gRPC server: its port, connections, limits, health service and graceful end.

It speaks gRPC over its own HTTP/2 (:mod:`h2_connection`) on the server's loop: what ``grpcio`` does for a call on its
own threads and in its own queues costs several times what everything else here does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.runtime.server.api import Core, ServeError
from toolchain.runtime.server.grpc_connection import GrpcConnection
from toolchain.runtime.server.grpc_health import Health
from toolchain.runtime.server.grpc_service import InferenceService
from toolchain.runtime.server.h2_connection import Http2Connection
from toolchain.runtime.server.listening import Listening
from toolchain.runtime.server.refusals import Refusals

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.shared_memory import SharedMemory

_SERVICE = "inference.GRPCInferenceService"
_HEALTH_INTERVAL = 0.5


class GrpcServer(Listening[Http2Connection]):
    """Serves a core over gRPC.

    Attributes:
        methods: by path.
        counts: answers by code.
    """

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        super().__init__(settings)
        self.counts: dict[str, int] = {}
        self.refusals = Refusals("grpc")
        self._core = core
        self._health = Health()
        self.methods = {**InferenceService(core, settings, memory, self.refused).methods(), **self._health.methods()}

    def connection(self) -> GrpcConnection:
        return GrpcConnection(self)

    async def drain(self, grace: float) -> None:
        """Take no new calls, let running ones end for ``grace`` seconds, then cancel what is left."""
        self._health.set(dict.fromkeys(self._states(), False))
        await super().drain(grace)

    def add(self, connection: Http2Connection) -> bool:
        """Whether there is room for another connection; a client goes elsewhere while the server ends."""
        return not self.draining and super().add(connection)

    def reserve(self, size: int) -> None:
        """Count bytes that a message takes: see :meth:`hold`."""
        self.hold(size)

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

    def tick(self) -> float:
        if not self.draining:
            self._health.set(self._states())
        return _HEALTH_INTERVAL

    def _states(self) -> dict[str, bool]:
        """The server as "" and as the service's name, and each model by its name."""
        states = dict.fromkeys(("", _SERVICE), self._core.ready())
        for name in {entry.name for entry in self._core.index()} - set(states):
            try:
                states[name] = self._core.model_ready(name)
            except ServeError:
                states[name] = False
        return states
