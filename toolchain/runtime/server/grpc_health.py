"""The standard health service of gRPC, ``grpc.health.v1``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.grpc_connection import Method

_SERVICE = "grpc.health.v1.Health"


class Health:
    """The states of the server and its models, and who watches them."""

    def __init__(self) -> None:
        self._states: dict[str, bool] = {}
        self._changed: set[asyncio.Event] = set()

    def methods(self) -> dict[str, Method]:
        """The service's methods by path."""
        found = {
            "Check": Method("Check", True, answer=self._check),
            "Watch": Method("Watch", True, stream=self._watch),
        }
        if hasattr(pb, "HealthListResponse"):
            found["List"] = Method("List", True, answer=self._list)
        return {f"/{_SERVICE}/{name}": method for name, method in found.items()}

    def set(self, states: dict[str, bool]) -> None:
        """Whether each of these serves; what is not in it any more is unknown."""
        if states != self._states:
            self._states = dict(states)
            for event in self._changed:
                event.set()

    def _status(self, name: str) -> int:
        good = self._states.get(name)
        response = pb.HealthCheckResponse
        if good is None:
            return int(response.SERVICE_UNKNOWN)
        return int(response.SERVING if good else response.NOT_SERVING)

    def _check(self, data: bytes) -> bytes:
        name = _name(data)
        if name not in self._states:
            raise ServeError(Status.NOT_FOUND, f"no service or model is called {name!r:.200}")
        return _bytes(pb.HealthCheckResponse(status=self._status(name)))

    def _list(self, data: bytes) -> bytes:
        statuses = {name: pb.HealthCheckResponse(status=self._status(name)) for name in self._states}
        return _bytes(pb.HealthListResponse(statuses=statuses))

    async def _watch(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        names = [_name(data) async for data in requests]
        if len(names) != 1:
            raise ServeError(Status.INVALID, "the call has no message, or more than one")
        told, changed = -1, asyncio.Event()
        self._changed.add(changed)
        try:
            while True:
                changed.clear()
                status = self._status(names[0])
                if status != told:
                    told = status
                    yield _bytes(pb.HealthCheckResponse(status=status))
                await changed.wait()
        finally:
            self._changed.discard(changed)


def _name(data: bytes) -> str:
    try:
        return str(pb.HealthCheckRequest.FromString(data).service)
    except DecodeError as error:
        raise ServeError(Status.INVALID, f"the request is no message of this method: {error}") from None


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())
