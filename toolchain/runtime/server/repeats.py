"""What is worth remembering: what comes a second time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from toolchain.runtime.server.api import InferRequest

if TYPE_CHECKING:
    import numpy as np

_SEEN = 8192


class Repeats:
    """Tells what came before, so that a cache holds nothing that comes once, such as a request with an id of its own.

    Not exact: it may take one thing for another of the same hash.  Nothing but whether to remember may depend on it.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def again(self, key: bytes) -> bool:
        """Whether it came before; noted if it did not."""
        mark = hash(key)
        if mark in self._seen:
            return True
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen.add(mark)
        return False


def renewed(like: InferRequest, model: str, version: str, inputs: dict[str, np.ndarray]) -> InferRequest:
    """A request like an earlier one, with its own inputs, that comes now."""
    return InferRequest(
        model,
        version,
        inputs,
        like.outputs,
        like.id,
        like.priority,
        like.timeout_us,
        like.bf16,
        like.parameters,
        time.monotonic_ns(),
    )
