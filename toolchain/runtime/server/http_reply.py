"""HTTP answers: status lines, headers and error bodies."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

from toolchain.runtime.server.api import ServeError

JSON = b"application/json"
BINARY = b"application/octet-stream"
TEXT = b"text/plain; charset=utf-8"
HTML = b"text/html; charset=utf-8"

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}
STATUS_LINES = {code: f"HTTP/1.1 {code} {reason}\r\n".encode() for code, reason in _REASONS.items()}


class Reply(NamedTuple):
    """One answer; ``headers`` are whole lines with their line ends.  An error may have been ``logged`` already."""

    status: int
    parts: list[bytes | memoryview]
    content_type: bytes = JSON
    headers: bytes = b""
    logged: bool = False


def json_reply(document: Any, status: int = 200) -> Reply:
    """A JSON document as an answer."""
    return Reply(status, [orjson.dumps(document)])


def error_reply(status: int, message: str, headers: bytes = b"") -> Reply:
    """The protocol's error: ``{"error": message}``."""
    text = message.encode("utf-8", "replace").decode()  # messages may quote lone surrogates, which JSON can't hold
    return Reply(status, [orjson.dumps({"error": text})], JSON, headers)


def refusal(error: ServeError) -> Reply:
    """The answer to a request that failed."""
    status = error.status.value[0]
    headers = b""
    if error.retry_after is not None:
        headers = b"Retry-After: %d\r\n" % max(1, -int(-error.retry_after // 1))  # whole seconds, rounded up
    elif status == 401:
        headers = b"WWW-Authenticate: Bearer\r\n"
    return error_reply(status, error.message, headers)._replace(logged=error.logged)
