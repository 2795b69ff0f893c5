"""Two calls timed against each other: in turns, so that a machine that slows down does so for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_SHORTEST = 1e-3
"""Seconds that a reading of the clock should cover: the clock itself takes about one microsecond."""
_LEAST, _MOST = 7, 201


@dataclass(frozen=True, slots=True)
class Race:
    """Medians over rounds: seconds of a call of each, and the ratio of second to first."""

    ratio: float
    first: float
    second: float


def race(first: Callable[[], object], second: Callable[[], object], seconds: float, threads: int) -> Race:
    """Runs both in short blocks, in turns, for about ``seconds``.

    With one thread the process's own CPU time counts: wall time there would count what other processes take.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    repeats = {call: _repeats(call, clock) for call in (first, second)}
    times: dict[Callable[[], object], list[float]] = {first: [], second: []}
    while len(times[first]) < _LEAST or (time.perf_counter() < end and len(times[first]) < _MOST):
        order = (first, second) if len(times[first]) % 2 else (second, first)
        for call in order:
            call()  # finds the caches full of the other
            start = clock()
            for _ in range(repeats[call]):
                call()
            times[call].append((clock() - start) / repeats[call])
    ratio = statistics.median(b / a for a, b in zip(times[first], times[second], strict=True))
    return Race(ratio, statistics.median(times[first]), statistics.median(times[second]))


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    """How many calls take long enough to be timed."""
    count = 1
    while True:
        start = clock()
        for _ in range(count):
            call()
        if (taken := clock() - start) >= _SHORTEST / 4 or count >= 1 << 16:
            return max(1, round(count * _SHORTEST / max(taken, 1e-9)))
        count *= 4
