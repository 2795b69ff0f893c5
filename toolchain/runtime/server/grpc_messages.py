"""gRPC over HTTP/2: what a call's headers say, its messages, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.compression import decompress
from toolchain.runtime.server.h2_frames import literal

#: Bytes in front of each message: whether it is compressed, and its length.
PREFIX = 5
#: Numbers of the statuses (grpc/doc/statuscodes.md).
CODES = {
    "OK": 0,
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MESSAGE_CHARACTERS = 2000
_START = b"\x88" + literal("content-type", "application/grpc")  # :status 200 is the static table's eighth
#: The header block of an answer, and the trailers of one that is good.
HEAD = _START + literal("grpc-accept-encoding", "identity, deflate, gzip")
GOOD = literal("grpc-status", "0")


class Call(NamedTuple):
    """What the headers of a call say.

    ``problem`` is set where they say that it can't be answered; ``timeout`` is in seconds, 0 for none.
    """

    path: str
    authorization: str
    timeout: float
    coding: str
    problem: ServeError | None


def read_call(headers: list[tuple[bytes, bytes]]) -> Call:
    """The call of a header block."""
    found = dict(headers)
    coding = found.get(b"grpc-encoding", b"identity").decode("latin-1")
    problem = None
    if found.get(b":method") != b"POST" or not found.get(b"content-type", b"").startswith(b"application/grpc"):
        problem = ServeError(Status.INVALID, "this is no gRPC: a POST with content-type application/grpc is needed")
    elif coding not in ("identity", "gzip", "deflate"):
        problem = ServeError(Status.UNSUPPORTED, f"grpc-encoding {coding!r:.40} is not supported; gzip and deflate are")
    timeout = 0.0
    text = found.get(b"grpc-timeout")
    if text is not None:
        if text[:-1].isdigit() and len(text) < 10 and text[-1:] in _UNITS:
            timeout = max(int(text[:-1]) * _UNITS[text[-1:]], 1e-9)
        else:
            problem = ServeError(Status.INVALID, f"grpc-timeout {text!r:.40} is no time")
    path = found.get(b":path", b"").decode("latin-1")
    return Call(path, found.get(b"authorization", b"").decode("latin-1"), timeout, coding, problem)


def prefixed(message: bytes) -> bytes:
    """A message with its prefix."""
    return b"\0%b%b" % (len(message).to_bytes(4, "big"), message)


def trailers(error: ServeError, *, alone: bool) -> bytes:
    """The header block that ends a call which failed; ``alone``: no headers went before."""
    block = _START if alone else b""
    block += literal("grpc-status", str(CODES[error.status.value[1]]))
    message = error.message[:_MESSAGE_CHARACTERS].encode("utf-8", "replace")
    # Percent-encoded but for printable ASCII (gRPC over HTTP2, Status-Message).
    block += literal("grpc-message", quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    if error.retry_after is not None:
        block += literal("retry-after", str(max(1, -int(-error.retry_after // 1))))
    return block


class Assembler:
    """Puts messages together from what comes, within limits.

    Args:
        limit: bytes of the largest message, also after decompression.
        coding: of messages that are compressed.
        reserve: told of the bytes of a message before there is memory for them; may refuse with a ServeError.
    """

    __slots__ = ("_coding", "_filled", "_limit", "_message", "_prefix", "_reserve")

    def __init__(self, limit: int, coding: str, reserve: Callable[[int], None]) -> None:
        self._coding = coding
        self._limit = limit
        self._reserve = reserve
        self._prefix = b""
        self._message: bytearray | None = None
        self._filled = 0

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._message is not None or bool(self._prefix)

    def put(self, payload: bytes) -> list[bytes]:
        """The messages that are complete by now.

        Raises:
            ServeError: TOO_LARGE; INVALID, what is compressed is damaged; INTERNAL, it is but wasn't said to be;
                or what ``reserve`` says.
        """
        found: list[bytes] = []
        at, size = 0, len(payload)
        while at < size or (self._message is not None and self._filled == len(self._message)):
            if self._message is None:
                took = min(PREFIX - len(self._prefix), size - at)
                self._prefix += payload[at : at + took]
                at += took
                if len(self._prefix) < PREFIX:
                    break
                length = int.from_bytes(self._prefix[1:], "big")
                if length > self._limit:
                    text = f"the message has {length} bytes, at most {self._limit} are allowed"
                    raise ServeError(Status.TOO_LARGE, text)
                self._reserve(length)
                self._message, self._filled = bytearray(length), 0
            took = min(len(self._message) - self._filled, size - at)
            self._message[self._filled : self._filled + took] = memoryview(payload)[at : at + took]
            self._filled += took
            at += took
            if self._filled == len(self._message):
                found.append(self._whole(self._prefix[0], bytes(self._message)))
                self._message, self._prefix = None, b""
        return found

    def whole(self, payload: bytes) -> bytes | None:
        """The message that ``payload`` is, if it is exactly one, not compressed."""
        plain = len(payload) >= PREFIX and not payload[0] and not self.partial
        if not plain or int.from_bytes(payload[1:PREFIX], "big") != len(payload) - PREFIX:
            return None
        return payload[PREFIX:] if len(payload) - PREFIX <= self._limit else None

    def _whole(self, compressed: int, message: bytes) -> bytes:
        if not compressed:
            return message
        if compressed > 1 or self._coding == "identity":
            raise ServeError(Status.INTERNAL, "a message says that it is compressed, the call's headers don't")
        return bytes(decompress(message, self._coding, self._limit))
