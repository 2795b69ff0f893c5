"""The sending half of an HTTP/2 connection: answers go out as the client's windows allow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from toolchain.runtime.server import h2_frames as h2
from toolchain.runtime.server.h2_frames import Http2Error, frame, number

if TYPE_CHECKING:
    from toolchain.runtime.server.grpc_server import GrpcServer

#: What a client may send of one request before it is told to go on.
STREAM_WINDOW = 1 << 20


class Stream:
    """One request and its answer, as far as HTTP/2 goes."""

    __slots__ = ("ended", "headed", "id", "taken", "trailers", "unsent", "window_in", "window_out", "writable")

    def __init__(self, number_: int, window_out: int) -> None:
        self.id = number_
        self.window_in = STREAM_WINDOW
        self.window_out = window_out
        self.taken = 0
        self.ended = self.headed = False
        self.unsent = memoryview(b"")
        self.trailers: bytes | None = None
        self.writable: asyncio.Future[None] | None = None


class Sending:
    """What answers the requests of one connection.

    Attributes:
        streams: those that have not been answered in full, by number.
        closing: nothing more is received or answered.
        write_deadline: when the client must have read what was sent; 0 where it keeps up.
    """

    def __init__(self, server: GrpcServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self.streams: dict[int, Any] = {}
        self.closing = False
        self.write_deadline = 0.0
        self._window_out = self.initial_out = h2.DEFAULT_WINDOW
        self._blocked: dict[int, Stream] = {}

    def pause_writing(self) -> None:
        self.write_deadline = self.server.now + self.server.settings.write_timeout
        self.transport.pause_reading()  # what is read wants answers, and those wouldn't go

    def resume_writing(self) -> None:
        self.write_deadline = 0.0
        self.transport.resume_reading()
        self._unblock()

    def send(self, stream: Stream, head: bytes, data: bytes, trailers: bytes | None) -> None:
        """Send header block, data and trailers, or queue what doesn't fit into the client's windows.

        Args:
            stream: whose answer it is.
            head: "" where the headers were sent before.
            data: one whole message.
            trailers: None where more follows.
        """
        size, number_ = len(data), stream.id
        stream.headed = True
        parts = [frame(h2.HEADERS, h2.END_HEADERS, number_, head)] if head else []
        if stream.unsent or size > min(self._window_out, stream.window_out, h2.FRAME_BYTES) or self.write_deadline:
            if parts:
                self.transport.write(parts[0])
            stream.unsent = memoryview(bytes(stream.unsent) + data)
            stream.trailers = trailers
            self._flush(stream)
            return
        if size:
            self._window_out -= size
            stream.window_out -= size
            parts.append(frame(h2.DATA, 0, number_, data))
        if trailers is not None:
            parts.append(frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number_, trailers))
        self.transport.write(b"".join(parts))
        if trailers is not None:
            self._answered(stream)

    def _flush(self, stream: Stream) -> None:
        while stream.unsent:
            room = min(self._window_out, stream.window_out, h2.FRAME_BYTES)
            if room <= 0 or self.write_deadline:
                self._blocked[stream.id] = stream
                return
            piece, stream.unsent = stream.unsent[:room], stream.unsent[room:]
            self._window_out -= len(piece)
            stream.window_out -= len(piece)
            self.transport.write(frame(h2.DATA, 0, stream.id, piece))
        if stream.writable is not None and not stream.writable.done():
            stream.writable.set_result(None)
        if stream.trailers is not None:
            self.transport.write(frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream.id, stream.trailers))
            self._answered(stream)

    def _unblock(self) -> None:
        for number_, stream in list(self._blocked.items()):
            if self.write_deadline or self.closing:
                return
            del self._blocked[number_]
            self._flush(stream)

    def _answered(self, stream: Stream) -> None:
        if not stream.ended:  # what else comes of the request is for nothing
            self.transport.write(frame(h2.RST_STREAM, 0, stream.id, number(h2.NO_ERROR)))
        self.forget(stream)

    def forget(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        if self.server.draining and not self.streams and not self.closing:
            self.closing = True
            self.transport.close()

    def set_up(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            key, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if key == h2.INITIAL_WINDOW_SIZE:
                if value > h2.LARGEST_WINDOW:
                    raise Http2Error(h2.FLOW_CONTROL_ERROR, "a window that is too large")
                for stream in self.streams.values():
                    stream.window_out += value - self.initial_out
                self.initial_out = value
        self.transport.write(frame(h2.SETTINGS, h2.ACK, 0))
        self._unblock()

    def widen(self, number_: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & h2.LARGEST_WINDOW
        if len(payload) != 4 or not increment:
            raise Http2Error(h2.PROTOCOL_ERROR, "a window is widened by nothing")
        if not number_:
            self._window_out += increment
            if self._window_out > h2.LARGEST_WINDOW:
                raise Http2Error(h2.FLOW_CONTROL_ERROR, "a window that is too large")
        elif number_ in self.streams:
            self.streams[number_].window_out += increment
            if self.streams[number_].window_out > h2.LARGEST_WINDOW:
                raise Http2Error(h2.FLOW_CONTROL_ERROR, "a window that is too large")
        self._unblock()
