"""Frames of HTTP/2 (RFC 9113) as bytes."""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
#: Flags.
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
#: Error codes.
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = range(4)
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = range(5, 10)
ENHANCE_YOUR_CALM = 0xB
#: Settings.
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(3, 7)
DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
#: Bytes of a frame's payload, the most that is sent and taken: what every peer has to take.
FRAME_BYTES = 16_384
HEAD_BYTES = 9


class Http2Error(Exception):
    """The peer broke the protocol: the connection ends with this error code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame(kind: int, flags: int, stream: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame."""
    head = (len(payload) << 48 | kind << 40 | flags << 32 | stream).to_bytes(HEAD_BYTES, "big")
    return head + payload


def number(value: int) -> bytes:
    """A payload of 32 bits: an error code or a window's increment."""
    return value.to_bytes(4, "big")


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def literal(name: str, value: str) -> bytes:
    """A header for a block: literal, not indexed, so that blocks depend on nothing that was sent before."""
    return b"\0" + _text(name.encode()) + _text(value.encode("latin-1", "replace"))


def _text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    size -= 127
    length = bytearray([127])
    while size >= 128:
        length.append(size % 128 + 128)
        size //= 128
    length.append(size)
    return bytes(length) + text


def unpadded(payload: bytes, flags: int) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority.

    Raises:
        Http2Error: it is shorter than what it says is in it.
    """
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise Http2Error(FRAME_SIZE_ERROR, "a padded frame without a length of its padding")
        start, end = 1, end - payload[0]
    if flags & PRIORITIZED:
        start += 5
    if start > end:
        raise Http2Error(PROTOCOL_ERROR, "a frame is shorter than its padding")
    return payload[start:end]
