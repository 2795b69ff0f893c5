"""Content codings of HTTP bodies: gzip and deflate, with a bound on what a body may grow to."""

from __future__ import annotations

import zlib

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.datatypes import invalid

#: zlib's window bits of each coding; deflate is zlib's format, or, as some clients send it, without its header.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_RAW_DEFLATE = -15
_LEVEL = 1
_PIECE = 1 << 20


def decompress(body: bytes | bytearray | memoryview, coding: str, limit: int) -> bytearray:
    """A body without its content coding.

    Args:
        body: as it came.
        coding: "gzip" or "deflate".
        limit: most bytes that it may have; never are more than these and one piece held.

    Raises:
        ServeError: UNSUPPORTED, another coding; INVALID, damaged; TOO_LARGE, above ``limit``.
    """
    window = _WINDOWS.get(coding)
    if window is None:
        raise ServeError(Status.UNSUPPORTED, f"Content-Encoding {coding!r:.40} is not supported; gzip and deflate are")
    if coding == "deflate" and len(body) and (body[0] & 0x0F) != 8:
        window = _RAW_DEFLATE
    result = bytearray()
    rest: bytes | bytearray | memoryview = body
    try:
        while True:  # a gzip body may have several members
            stream = zlib.decompressobj(window)
            while not stream.eof:
                piece = stream.decompress(rest, min(_PIECE, limit + 1 - len(result)))
                result += piece
                if len(result) > limit:
                    raise ServeError(Status.TOO_LARGE, f"the decompressed request has more than {limit} bytes")
                rest = stream.unconsumed_tail if not stream.eof else stream.unused_data
                if not piece and not rest and not stream.eof:
                    invalid(f"the {coding} body ends too early")
            if not rest:
                return result
            if coding == "deflate":
                invalid("bytes follow the end of the deflate body")
    except zlib.error as error:
        raise ServeError(Status.INVALID, f"the {coding} body is damaged: {error}") from None


def accepted(header: bytes) -> str:
    """The coding to answer with, of those in an ``Accept-Encoding`` header; "" for none."""
    qualities: dict[str, float] = {}
    for entry in header.decode("latin-1").lower().split(","):
        name, *parameters = [part.strip() for part in entry.split(";")]
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        qualities[name] = quality
    rest = qualities.get("*", 0.0)
    best = max(("gzip", "deflate"), key=lambda name: qualities.get(name, rest))
    return best if qualities.get(best, rest) > 0 else ""


def compress(parts: list[bytes | memoryview], coding: str) -> bytes:
    """The parts of a body in one, compressed quickly rather than well."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOWS[coding])
    return b"".join([*[stream.compress(part) for part in parts], stream.flush()])
