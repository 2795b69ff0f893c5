"""Structured logs: a line of JSON each, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from toolchain.runtime.server.api import InferRequest, ServeError, Status

LOGGER = "toolchain.serve"
_log = logging.getLogger(LOGGER)
_SERVERS_FAULT = (Status.INTERNAL, Status.UNAVAILABLE)
#: Failed requests are logged at most so often a second, and so are refused ones: clients must not fill the disk.
_A_SECOND = 10


class JsonFormatter(logging.Formatter):
    """One record as one line: time, level, message and the record's ``facts``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "facts", {}))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up_logs(level: int = logging.INFO) -> None:
    """Send the server's logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    _log.handlers = [handler]
    _log.setLevel(level)
    _log.propagate = False


class _Limit:
    """Allows so many a second, and counts the others."""

    def __init__(self) -> None:
        self.hidden = 0
        self._second = 0
        self._count = 0

    def allows(self) -> bool:
        second = time.monotonic_ns() // 1_000_000_000
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        self.hidden += self._count > _A_SECOND
        return self._count <= _A_SECOND


class RequestLog:
    """Logs of single requests: failed and refused ones up to ten a second each, successes in part.

    Args:
        success_share: share of the answered requests that are logged.
    """

    def __init__(self, success_share: float) -> None:
        self._share = success_share
        self._due = 0.0
        self._failures, self._refusals = _Limit(), _Limit()

    def wants_success(self) -> bool:
        """Whether the next success is one of those that are logged."""
        if not self._share:
            return False
        self._due += self._share
        if self._due < 1.0:
            return False
        self._due -= 1.0
        return True

    def answered(self, request: InferRequest, version: str, arrived: int) -> None:
        _log.info("request answered", extra={"facts": _facts(request, version, arrived)})

    def refused(self, request: InferRequest, version: str, error: ServeError, arrived: int) -> None:
        faulty = error.status in _SERVERS_FAULT
        limit = self._failures if faulty else self._refusals
        if not limit.allows():
            return
        facts = _facts(request, version, arrived) | {"status": error.status.value[0], "error": error.message}
        if limit.hidden:
            facts["not_logged_before"], limit.hidden = limit.hidden, 0
        if faulty:
            _log.error("request failed", extra={"facts": facts})
        else:
            _log.warning("request refused", extra={"facts": facts})


def _facts(request: InferRequest, version: str, arrived: int) -> dict[str, Any]:
    spent = (time.monotonic_ns() - arrived) / 1e6
    return {"model": request.model, "version": version, "request": request.id, "ms": round(spent, 3)}
