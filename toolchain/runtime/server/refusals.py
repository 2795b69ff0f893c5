"""Logs what the front ends refuse before it reaches a model, up to ten a second: clients must not fill the disk."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger("toolchain.serve")
_A_SECOND = 10


class Refusals:
    """The refused requests of one front end.

    Args:
        protocol: "http" or "grpc".
    """

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        self._second = self._count = self._hidden = 0

    def allows(self) -> bool:
        """Whether one more may be logged now; it is counted if not."""
        second = time.monotonic_ns() // 1_000_000_000
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        self._hidden += self._count > _A_SECOND
        return self._count <= _A_SECOND

    def note(self, what: str, status: int | str, message: str) -> None:
        """Log one that :meth:`allows` let pass.

        Args:
            what: method and path, or the RPC.
            status: as it was answered.
            message: the error that the client was told.
        """
        facts: dict[str, object] = {"protocol": self._protocol, "request": what[:200], "status": status}
        facts["error"] = message
        if self._hidden:
            facts["not_logged_before"], self._hidden = self._hidden, 0
        _log.warning("request refused", extra={"facts": facts})
