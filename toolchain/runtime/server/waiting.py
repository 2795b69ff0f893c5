"""Requests that wait: by priority, then by what they can be merged with, then by age."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from toolchain.runtime.server.api import ServeError
from toolchain.runtime.server.checks import Fit

if TYPE_CHECKING:
    from toolchain.runtime.server.slots import Shapes


@dataclass(frozen=True, slots=True)
class Queueing:
    """How requests wait.

    Attributes:
        max_rows: rows of a merged run; a request that has more alone still runs, alone.
        delay_ns: how long a batch that is not full may wait for more.
        size: most requests that wait.
        nbytes: most bytes of inputs that wait.
        timeout_ns: how long a request may wait that names no time itself; 0: any time.
        levels: levels of priority, 1 the highest.
        default_level: of a request that names none.
    """

    max_rows: int = 1
    delay_ns: int = 0
    size: int = 256
    nbytes: int = 256_000_000
    timeout_ns: int = 0
    levels: int = 1
    default_level: int = 1


class Pending:
    """One request between its check and its answer."""

    __slots__ = (
        "alone",
        "arrays",
        "arrived",
        "crashes",
        "error",
        "fit",
        "future",
        "group",
        "level",
        "outputs",
        "queued",
        "timer",
    )

    def __init__(self, arrays: list[np.ndarray], fit: Fit, level: int, arrived: int) -> None:
        self.arrays = arrays
        self.fit = fit
        self.level = level
        self.arrived = arrived
        self.queued = 0
        self.alone = False
        self.crashes = 0
        self.group: _Group | None = None
        self.future: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.outputs: list[np.ndarray] | None = None
        self.error: ServeError | None = None


class _Group:
    """Waiting requests of one level that may run together."""

    __slots__ = ("rows", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Pending] = deque()
        self.rows = 0


class Queue:
    """The waiting requests of one model version.  Not bounded by itself: the batcher asks before it enters one.

    Args:
        levels: levels of priority, 1 the highest.
        most_rows: rows of a merged run.
    """

    def __init__(self, levels: int, most_rows: int) -> None:
        self.most_rows = most_rows
        self.count = 0
        self.nbytes = 0
        self._levels: list[dict[Shapes, _Group]] = [{} for _ in range(levels)]

    def enter(self, pending: Pending, *, first: bool = False) -> None:
        """Put a request at the end, or before all others of its level that it can be merged with."""
        groups = self._levels[pending.level - 1]
        group = groups.get(pending.fit.group)
        if group is None:
            group = groups[pending.fit.group] = _Group()
        (group.waiting.appendleft if first else group.waiting.append)(pending)
        group.rows += pending.fit.rows
        pending.group = group
        self.count += 1
        self.nbytes += pending.fit.nbytes

    def leave(self, pending: Pending) -> None:
        """Take out a request that waits."""
        group = pending.group
        assert group is not None
        group.waiting.remove(pending)
        self._left(pending, group)

    def take(self, now: int, delay: int) -> tuple[list[Pending], int]:
        """The members of the next run, and 0; or none, and the nanoseconds that the batch may still wait for more.

        Call it only while requests wait.
        """
        groups = next(groups for groups in self._levels if groups)
        if len(groups) == 1:
            (group,) = groups.values()
        else:
            group = min(groups.values(), key=lambda g: g.waiting[0].queued)
        first = group.waiting[0]
        if delay and group.rows < self.most_rows and not first.alone:
            left = first.queued + delay - now
            if left > 0:
                return [], left
        group.waiting.popleft()
        self._left(first, group)
        members, rows = [first], first.fit.rows
        while not first.alone and group.waiting:
            following = group.waiting[0]
            rows += following.fit.rows
            if rows > self.most_rows or following.alone:
                break
            group.waiting.popleft()
            self._left(following, group)
            members.append(following)
        return members, 0

    def all(self) -> list[Pending]:
        """Everything that waits."""
        return [pending for groups in self._levels for group in groups.values() for pending in group.waiting]

    def _left(self, pending: Pending, group: _Group) -> None:
        group.rows -= pending.fit.rows
        pending.group = None
        self.count -= 1
        self.nbytes -= pending.fit.nbytes
        if not group.waiting:
            del self._levels[pending.level - 1][pending.fit.group]
