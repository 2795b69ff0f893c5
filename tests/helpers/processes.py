"""Looking at processes from the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path


def running(pids: Iterable[int]) -> list[int]:
    """Those of ``pids`` that are still running (a zombie is not)."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]


def descendants(pid: int) -> list[int]:
    """All running processes below ``pid``."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            parents[int(folder.name)] = int(fields[1])
    found: list[int] = []
    layer = {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer}
        found += sorted(layer)
    return found


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until ``condition`` holds; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def read_pids(path: Path) -> list[int]:
    """The pids that a child noted in ``path``, once they are there."""
    wait_until(path.exists, f"{path.name} is written")
    return [int(pid) for pid in path.read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
