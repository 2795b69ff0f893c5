"""The gRPC server: its port, limits, health service and graceful end."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from toolchain.runtime.server.api import Core, ServeError
from toolchain.runtime.server.grpc_service import InferenceService

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings, TlsFiles
    from toolchain.runtime.server.shared_memory import SharedMemory

_SERVICE = "inference.GRPCInferenceService"
_HEAD_ROOM = 64 * 1024
_HEALTH_INTERVAL = 0.5
_PING_MS = 5000


class GrpcServer:
    """Serves a core over gRPC; ``port`` is where it listens, after :meth:`listen`."""

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        self.port = 0
        self._core = core
        self._settings = settings
        self._memory = memory
        self._server: Any = None
        self._health = health_aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int, tls: TlsFiles | None = None, reuse_port: bool = False) -> None:
        """Start to answer; port 0 is any that is free.

        Raises:
            OSError: the address can't be listened on.
        """
        settings = self._settings
        options = [
            ("grpc.max_receive_message_length", settings.max_body + _HEAD_ROOM),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", settings.max_head),
            ("grpc.max_concurrent_streams", settings.max_connections),
            ("grpc.so_reuseport", int(reuse_port)),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((InferenceService(self._core, settings, self._memory).handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                pair = (Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes())
                self.port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise OSError(f"can't listen on {address} for gRPC: {error}") from None
        if self.port == 0:
            raise OSError(f"can't listen on {address} for gRPC")
        await self._server.start()
        await self._set_health()
        self._watch = asyncio.create_task(self._follow())

    async def drain(self, grace: float) -> None:
        """Take no new calls, let running ones end for ``grace`` seconds, then cancel what is left."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace)

    async def _follow(self) -> None:
        """Keep the health service's answers true."""
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL)
            await self._set_health()

    async def _set_health(self) -> None:
        """The server as "" and as the service's name, and each model by its name."""
        states = dict.fromkeys(("", _SERVICE), self._core.ready())
        for name in {entry.name for entry in self._core.index()} - set(states):
            try:
                states[name] = self._core.model_ready(name)
            except ServeError:
                states[name] = False
        response = health_pb2.HealthCheckResponse
        for name, good in states.items():
            await self._health.set(name, response.SERVING if good else response.NOT_SERVING)
