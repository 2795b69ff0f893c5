"""A request as it is received, memory for its body, and a task that begins at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from toolchain.runtime.server.http_reply import Reply
    from toolchain.runtime.server.routes import Route

_ALIGNMENT = 64
#: The headers that are looked at; others are not kept.
WANTED = frozenset(
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


class Request:
    """One request, complete; ``reply`` is set where it was refused before it reached its handler."""

    __slots__ = ("body", "close", "headers", "method", "reply", "reserved", "route", "started", "target")

    def __init__(
        self, method: bytes, target: bytes, route: Route, headers: dict[bytes, bytes], body: bytes = b""
    ) -> None:
        self.method = method
        self.target = target
        self.route = route
        self.headers = headers
        self.body: bytes | bytearray | memoryview = body
        self.reply: Reply | None = None
        self.reserved = 0
        self.close = False
        self.started = 0


def room_for(length: int, json_length: bytes) -> memoryview:
    """Memory for a body whose binary tensors begin at ``json_length``: they lie aligned there."""
    before = int(json_length) if json_length.isdigit() and len(json_length) < 16 else 0
    memory = np.empty(length + _ALIGNMENT, np.uint8)
    start = -(memory.ctypes.data + before) % _ALIGNMENT
    return memory[start : start + length].data


def begin(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
    """Run a coroutine up to its first wait, and the rest as a task; None where there is no rest.

    What answers without waiting so needs no task, and no other turn of the loop (as eager tasks in Python 3.12; unlike
    these it has no current task in its first part).
    """
    context = contextvars.copy_context()
    try:
        awaited = context.run(coroutine.send, None)
    except StopIteration:
        return None
    return loop.create_task(_rest(coroutine, awaited), context=context)


async def _rest(coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
    await _Rest(coroutine, awaited)


class _Rest:
    """Awaits what is left of a coroutine that waits for ``awaited``."""

    __slots__ = ("_awaited", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        awaited = self._awaited
        while True:
            try:
                value = yield awaited
            except BaseException as error:
                thrown: BaseException | None = error
            else:
                thrown = None
            try:
                awaited = self._coroutine.send(value) if thrown is None else self._coroutine.throw(thrown)
            except StopIteration:
                return
            finally:
                del thrown  # it knows this frame: a cycle, with the request's body in it
