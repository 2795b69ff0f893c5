"""What is worth remembering: what comes a second time."""

from __future__ import annotations

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
