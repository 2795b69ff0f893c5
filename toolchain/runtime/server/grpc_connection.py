"""One connection of gRPC clients: calls begin, get messages, are answered, are given up."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.frontend import check_bearer
from toolchain.runtime.server.grpc_messages import GOOD, HEAD, Assembler, Call, prefixed, read_call, trailers
from toolchain.runtime.server.h2_connection import Headers, Http2Connection
from toolchain.runtime.server.h2_sending import Stream
from toolchain.runtime.server.http_request import begin

if TYPE_CHECKING:
    from toolchain.runtime.server.grpc_server import GrpcServer

_log = logging.getLogger("toolchain.serve")
_HEAD_ROOM = 64 * 1024
#: Larger messages count for ``max_pending``.
_SMALL = 32 * 1024


Reserve = Callable[[int], None]


class Method(NamedTuple):
    """How one RPC is answered.

    Attributes:
        name: for the log.
        open: whether it needs no token.
        answer: from a message to its answer's, both as bytes, or to what gives it; None for streams.
        stream: from the messages of a call to the answers; None for others.
    """

    name: str
    open: bool
    answer: Callable[[bytes], Any] | None = None
    stream: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]] | None = None


class CallStream(Stream):
    """One call."""

    __slots__ = ("assembler", "call", "deadline", "inbox", "message", "method", "reserved", "task", "timer")

    def __init__(
        self, number: int, window_out: int, call: Call, method: Method | None, limit: int, reserve: Reserve
    ) -> None:
        super().__init__(number, window_out)
        self.call = call
        self.method = method
        self.assembler = Assembler(limit, call.coding, reserve)
        self.message: bytes | None = None
        self.inbox: asyncio.Queue[bytes | ServeError | None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.deadline = float("inf")
        self.reserved = 0


class GrpcConnection(Http2Connection):
    """See the module."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__(server)
        self._limit = server.settings.max_body + _HEAD_ROOM

    def understand(self, headers: Headers) -> tuple[Call, Method | None]:
        call = read_call(headers)
        return call, self.server.methods.get(call.path)

    def new_stream(self, number: int, window_out: int, understood: tuple[Call, Method | None]) -> CallStream:
        call, method = understood
        stream = CallStream(number, window_out, call, method, self._limit, lambda size: self._reserve(stream, size))
        stream.deadline = self.server.now + self.server.settings.body_timeout
        if call.timeout:
            stream.timer = self.server.loop.call_later(call.timeout, self._expire, stream)
        return stream

    def on_data(self, stream: CallStream, payload: bytes) -> None:
        method = stream.method
        try:
            if stream.inbox is not None:
                self._into_inbox(stream, payload)
                return
            message = stream.assembler.whole(payload) if stream.message is None else None
            if message is None:
                self._collect(stream, payload)
            else:
                stream.message = message
        except ServeError as error:
            self._refuse(stream, error)
            return
        if not stream.ended:
            stream.deadline = self.server.now + self.server.settings.body_timeout
            self.more(stream)
            return
        stream.deadline = float("inf")
        assert method is not None
        if stream.message is None or stream.assembler.partial:
            self._refuse(stream, ServeError(Status.INVALID, "the call has no whole message"))
        else:
            self._answer(stream, method, stream.message)

    def on_request(self, stream: CallStream) -> None:
        try:
            self._begin(stream)
        except ServeError as error:
            self._refuse(stream, error)

    def _begin(self, stream: CallStream) -> None:
        """Look at a call's headers, in every call.

        Raises:
            ServeError: it can't be answered.
        """
        call, method, settings = stream.call, stream.method, self.server.settings
        if call.problem is not None:
            raise ServeError(call.problem.status, call.problem.message)
        if method is None:
            raise ServeError(Status.UNSUPPORTED, f"there is no method {call.path!r:.200}")
        if settings.authorize is not None and not method.open:
            check_bearer(settings, call.authorization)
        if method.stream is not None:
            stream.inbox = asyncio.Queue()
            stream.task = self.server.loop.create_task(self._stream(stream, method))

    def _collect(self, stream: CallStream, payload: bytes) -> None:
        found = stream.assembler.put(payload)
        if len(found) > (stream.message is None):
            raise ServeError(Status.INVALID, "the call has more than one message")
        if found:
            stream.message = found[0]

    def _into_inbox(self, stream: CallStream, payload: bytes) -> None:
        assert stream.inbox is not None
        stream.deadline = float("inf")
        try:
            for message in stream.assembler.put(payload):
                stream.inbox.put_nowait(message)
            if stream.ended and stream.assembler.partial:
                raise ServeError(Status.INVALID, "the call ends within a message")
        except ServeError as error:
            stream.inbox.put_nowait(error)
        if stream.assembler.partial:
            stream.deadline = self.server.now + self.server.settings.body_timeout
            self.more(stream)
        if stream.ended:
            stream.inbox.put_nowait(None)

    def _reserve(self, stream: CallStream, size: int) -> None:
        if size > _SMALL:
            self.server.reserve(size)
            stream.reserved += size

    def _answer(self, stream: CallStream, method: Method, message: bytes) -> None:
        assert method.answer is not None
        stream.message = None
        try:
            answer = method.answer(message)
        except ServeError as error:
            self._refuse(stream, error)
        except Exception:
            self._refuse(stream, _broken(method))
        else:
            if type(answer) is bytes:
                self._finish(stream, answer)
            else:
                stream.task = begin(self._wait(stream, method, answer), self.server.loop)

    async def _wait(self, stream: CallStream, method: Method, answer: Any) -> None:
        try:
            data = await answer
        except ServeError as error:
            self._refuse(stream, error)
        except Exception:
            self._refuse(stream, _broken(method))
        else:
            self._finish(stream, data)

    def _finish(self, stream: CallStream, data: bytes) -> None:
        if self._over(stream):
            counts = self.server.counts
            counts["OK"] = counts.get("OK", 0) + 1
            self.send(stream, HEAD, prefixed(data), GOOD)

    def _refuse(self, stream: CallStream, error: ServeError) -> None:
        if self._over(stream):
            self.server.refused(stream.call.path, error)
            self.send(stream, b"", b"", trailers(error, alone=not stream.headed))

    def _over(self, stream: CallStream) -> bool:
        """Whether the call has yet to be answered; from now on it is."""
        if stream.timer is not None:
            stream.timer.cancel()
        stream.task = None
        self.server.release(stream.reserved)
        stream.reserved = 0
        return stream.id in self.streams and not self.closing

    async def _stream(self, stream: CallStream, method: Method) -> None:
        """Send the answers of a call that has many."""
        assert method.stream is not None
        answers = method.stream(self._inbox(stream))
        try:
            async for answer in answers:
                self.send(stream, b"" if stream.headed else HEAD, prefixed(answer), None)
                if stream.unsent:
                    stream.writable = self.server.loop.create_future()
                    await stream.writable
        except ServeError as error:
            self._refuse(stream, error)
        except Exception:
            self._refuse(stream, _broken(method))
        else:
            if self._over(stream):
                self.send(stream, b"" if stream.headed else HEAD, b"", GOOD)
        finally:
            if inspect.isasyncgen(answers):
                await answers.aclose()

    async def _inbox(self, stream: CallStream) -> AsyncIterator[bytes]:
        assert stream.inbox is not None
        while (message := await stream.inbox.get()) is not None:
            if isinstance(message, ServeError):
                raise message
            if stream.inbox.empty():
                self.server.release(stream.reserved)
                stream.reserved = 0
            self.more(stream)
            yield message

    def _expire(self, stream: CallStream) -> None:
        task = stream.task
        self._refuse(stream, ServeError(Status.TIMEOUT, "the call's deadline has passed"))
        if task is not None:
            task.cancel()

    def on_gone(self, stream: CallStream) -> None:
        task = stream.task
        self._over(stream)
        if task is not None:
            # Soon, so that the task has begun and can clean up.
            self.server.loop.call_soon(task.cancel)

    def tick(self, now: float) -> None:
        super().tick(now)
        for stream in list(self.streams.values()):
            if now > stream.deadline and not stream.ended:
                self._refuse(stream, ServeError(Status.TIMEOUT, "the call's message did not come in time"))


def _broken(method: Method) -> ServeError:
    _log.exception("request failed", extra={"facts": {"rpc": method.name}})
    error = ServeError(Status.INTERNAL, "the server failed to answer this request; its log says why")
    error.logged = True
    return error
