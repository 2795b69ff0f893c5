"""One HTTP/2 connection of a server: frames in and out, header compression and flow control, within limits.

It is no general HTTP/2 server: it takes what gRPC sends, requests of small heads and length-prefixed messages.  Header
blocks of answers are written without compression, so that they are constants.  A client that repeats a header block
gets what that block said before, as long as the compression's table is the same; so the table is hardly ever asked.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from hpack import Decoder, HPACKError

from toolchain.runtime.server import h2_frames as h2
from toolchain.runtime.server.h2_frames import Http2Error, frame, number
from toolchain.runtime.server.h2_sending import STREAM_WINDOW, Sending, Stream

if TYPE_CHECKING:
    from toolchain.runtime.server.grpc_server import GrpcServer

#: What a client may send of all requests of a connection before it is told to go on.
CONNECTION_WINDOW = 16 << 20
_KNOWN = 64
_LONGEST_BLOCK = 64 * 1024
#: Frames without a request in them that a client may send in a second, and requests that it may take back.
_CONTROL_A_SECOND, _RESETS_A_SECOND = 5000, 1000

Headers = list[tuple[bytes, bytes]]


class Http2Connection(Sending, asyncio.Protocol):
    """See the module.  A subclass says what requests, their data and their end mean."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__(server)
        self.last = 0
        self.greeted = False
        self.deadline = server.now + server.settings.head_timeout
        self._decoder = Decoder(server.settings.max_head)
        self._known: dict[bytes, Any] = {}
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None
        self._window_in, self._taken = CONNECTION_WINDOW, 0
        self._control = self._resets = 0

    # What a subclass does.

    def understand(self, headers: Headers) -> Any:
        """What a request's headers say; kept for when they come again."""
        raise NotImplementedError

    def new_stream(self, number_: int, window_out: int, understood: Any) -> Any:
        """A stream for a request that begins."""
        raise NotImplementedError

    def on_request(self, stream: Any) -> None:
        """A request has begun."""
        raise NotImplementedError

    def on_data(self, stream: Any, payload: bytes) -> None:
        """Something of a request came; it is its end if ``stream.ended``."""
        raise NotImplementedError

    def on_gone(self, stream: Any) -> None:
        """The client doesn't want an answer any more, or is gone."""
        raise NotImplementedError

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if not self.server.add(self):
            self.transport.abort()
            return
        limits = self.server.settings
        values = {h2.MAX_CONCURRENT_STREAMS: limits.max_connections, h2.INITIAL_WINDOW_SIZE: STREAM_WINDOW}
        more = frame(h2.WINDOW_UPDATE, 0, 0, number(CONNECTION_WINDOW - h2.DEFAULT_WINDOW))
        self.transport.write(h2.settings(values | {h2.MAX_HEADER_LIST_SIZE: limits.max_head}) + more)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        for stream in list(self.streams.values()):
            self._gone(stream)
        self.server.remove(self)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        try:
            if self._rest:
                data = self._rest + data
            at = 0
            if not self.greeted:
                if len(data) < len(h2.PREFACE) and h2.PREFACE.startswith(data):
                    self._rest = data
                    return
                if not data.startswith(h2.PREFACE):
                    raise Http2Error(h2.PROTOCOL_ERROR, "this is no HTTP/2")
                self.greeted, at = True, len(h2.PREFACE)
            size = len(data)
            while size - at >= h2.HEAD_BYTES:
                length = int.from_bytes(data[at : at + 3], "big")
                if length > h2.FRAME_BYTES:
                    raise Http2Error(h2.FRAME_SIZE_ERROR, f"a frame has more than {h2.FRAME_BYTES} bytes")
                start = at + h2.HEAD_BYTES
                end = start + length
                if end > size:
                    break
                number_ = int.from_bytes(data[at + 5 : start], "big") & 0x7FFFFFFF
                self._frame(data[at + 3], data[at + 4], number_, data[start:end])
                at = end
            self._rest = data[at:]
            if self._block is None and not self._rest:
                self.deadline = float("inf")
            elif at or self.deadline == float("inf"):  # a frame that comes in drops has no more time for each
                self.deadline = self.server.now + self.server.settings.head_timeout
        except Http2Error as fault:
            self.fail(fault)

    def _frame(self, kind: int, flags: int, number_: int, payload: bytes) -> None:
        if self._block is not None and (kind != h2.CONTINUATION or number_ != self._block[0]):
            raise Http2Error(h2.PROTOCOL_ERROR, "a header block is not continued")
        if kind == h2.HEADERS:
            if flags & (h2.PADDED | h2.PRIORITIZED):
                payload = h2.unpadded(payload, flags)
            if flags & h2.END_HEADERS:
                self._headers(number_, flags, payload)
            else:
                self._block = number_, flags, bytearray(payload)
        elif kind == h2.DATA:
            self._data(number_, flags, payload)
        elif kind == h2.CONTINUATION:
            self._continue(flags, payload)
        else:
            self._control += 1
            if self._control > _CONTROL_A_SECOND:
                raise Http2Error(h2.ENHANCE_YOUR_CALM, "too many frames without requests")
            self._other(kind, flags, number_, payload)

    def _continue(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Http2Error(h2.PROTOCOL_ERROR, "a continuation of nothing")
        number_, first, block = self._block
        block += payload
        self._control += 1
        if len(block) > min(_LONGEST_BLOCK, 2 * self.server.settings.max_head) or self._control > _CONTROL_A_SECOND:
            raise Http2Error(h2.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & h2.END_HEADERS:
            self._block = None
            self._headers(number_, first, bytes(block))

    def _headers(self, number_: int, flags: int, block: bytes) -> None:
        understood = self._known.get(block)
        if understood is None:
            understood = self._understood(block)
        stream = self.streams.get(number_)
        if stream is not None:  # trailers, of which gRPC's clients send none
            if not flags & h2.END_STREAM or stream.ended:
                raise Http2Error(h2.PROTOCOL_ERROR, "headers within a request")
            stream.ended = True
            self.on_data(stream, b"")
            return
        if number_ <= self.last:
            return  # it was answered before it had ended
        if not number_ % 2:
            raise Http2Error(h2.PROTOCOL_ERROR, "a request on a server's stream")
        self.last = number_
        if len(self.streams) >= self.server.settings.max_connections or self.server.draining:
            self.transport.write(frame(h2.RST_STREAM, 0, number_, number(h2.REFUSED_STREAM)))
            return
        stream = self.streams[number_] = self.new_stream(number_, self.initial_out, understood)
        stream.ended = bool(flags & h2.END_STREAM)
        self.on_request(stream)
        if stream.ended and number_ in self.streams:
            self.on_data(stream, b"")

    def _understood(self, block: bytes) -> Any:
        """What a header block says; remembered if it says the same when it comes again."""
        table = self._decoder.header_table
        before = tuple(table.dynamic_entries), table.maxsize
        try:
            headers = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise Http2Error(h2.COMPRESSION_ERROR, f"the headers can't be read: {error}") from None
        understood = self.understand(headers)
        if (tuple(table.dynamic_entries), table.maxsize) != before or len(self._known) >= _KNOWN:
            self._known.clear()
        if (tuple(table.dynamic_entries), table.maxsize) == before:
            self._known[block] = understood
        return understood

    def _data(self, number_: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._window_in -= size
        self._taken += size
        if self._window_in < 0:
            raise Http2Error(h2.FLOW_CONTROL_ERROR, "more data than was asked for")
        if self._taken > CONNECTION_WINDOW // 2:
            self.transport.write(frame(h2.WINDOW_UPDATE, 0, 0, number(self._taken)))
            self._window_in += self._taken
            self._taken = 0
        stream = self.streams.get(number_)
        if stream is None or stream.ended:
            if number_ > self.last or not number_:
                raise Http2Error(h2.PROTOCOL_ERROR, "data of no request")
            return
        if flags & h2.PADDED:
            payload = h2.unpadded(payload, flags & h2.PADDED)
        if not payload and not flags & h2.END_STREAM:
            self._control += 1
        stream.window_in -= size
        stream.taken += size
        if stream.window_in < 0:
            raise Http2Error(h2.FLOW_CONTROL_ERROR, "more data of a request than was asked for")
        stream.ended = bool(flags & h2.END_STREAM)
        self.on_data(stream, payload)

    def more(self, stream: Stream) -> None:
        """Ask for more of a request, when half of what was asked for has been dealt with."""
        if stream.taken > STREAM_WINDOW // 2 and not stream.ended and not self.closing:
            self.transport.write(frame(h2.WINDOW_UPDATE, 0, stream.id, number(stream.taken)))
            stream.window_in += stream.taken
            stream.taken = 0

    def _other(self, kind: int, flags: int, number_: int, payload: bytes) -> None:
        if kind == h2.SETTINGS:
            if number_ or len(payload) % 6:
                raise Http2Error(h2.FRAME_SIZE_ERROR, "settings of a wrong size")
            if not flags & h2.ACK:
                self.set_up(payload)
        elif kind == h2.PING:
            if len(payload) != 8:
                raise Http2Error(h2.FRAME_SIZE_ERROR, "a ping of a wrong size")
            if not flags & h2.ACK:
                self.transport.write(frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.WINDOW_UPDATE:
            self.widen(number_, payload)
        elif kind == h2.RST_STREAM:
            self._resets += 1
            if self._resets > _RESETS_A_SECOND or len(payload) != 4:
                raise Http2Error(h2.ENHANCE_YOUR_CALM, "too many requests were taken back")
            stream = self.streams.get(number_)
            if stream is not None:
                self._gone(stream)
        elif kind == h2.PUSH_PROMISE:
            raise Http2Error(h2.PROTOCOL_ERROR, "clients can't push")

    def _gone(self, stream: Any) -> None:
        self.forget(stream)
        if stream.writable is not None and not stream.writable.done():
            stream.writable.cancel()
        self.on_gone(stream)

    def fail(self, fault: Http2Error) -> None:
        """End the connection."""
        if self.closing:
            return
        self.closing = True
        text = fault.reason.encode()
        self.transport.write(frame(h2.GOAWAY, 0, 0, number(self.last) + number(fault.code) + text))
        self.transport.close()

    # What the server calls.

    def go_away(self) -> None:
        """Take no more requests, and close when those that run are answered."""
        self.transport.write(frame(h2.GOAWAY, 0, 0, number(self.last) + number(h2.NO_ERROR)))
        if not self.streams and not self.closing:
            self.closing = True
            self.transport.close()

    def tick(self, now: float) -> None:
        """Look for deadlines that have passed; about once a second."""
        self._control = self._resets = 0
        if (self.write_deadline and now > self.write_deadline) or now > self.deadline:
            self.transport.abort()
