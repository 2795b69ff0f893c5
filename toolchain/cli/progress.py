"""Progress on standard error: a live line per running stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.runner import Node, Outcome


class Progress:
    """Receives the build's events.  ``quiet`` shows nothing; ``plain`` forces plain lines."""

    def __init__(self, quiet: bool = False, plain: bool = False) -> None:
        self._quiet = quiet
        self._live = None
        self._lock = threading.Lock()
        self._running: dict[str, float] = {}
        if not quiet and not plain and sys.stderr.isatty():
            self._live = _live()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def started(self, node: Node) -> None:
        """A stage has begun (looking into the cache included)."""
        with self._lock:
            self._running[node.id] = time.monotonic()
            self._refresh()

    def running(self, node: Node) -> None:
        """A stage is really run; without a terminal that is a line, as its end may be long in coming."""
        if not self._live:
            with self._lock:
                self._print(f" started  {node.id}")

    def finished(self, node: Node, outcome: Outcome) -> None:
        """A stage has ended."""
        if outcome.status == "skipped":
            # The stage that refused has said why; the report names every engine that is not offered.
            self._done(node.id, None)
            return
        note = f": {outcome.refused}" if outcome.refused else ""
        timing = f"{outcome.seconds:.1f} s" if outcome.status == "ran" else outcome.status
        self._done(node.id, f"{timing:>8}  {node.id}{note}")

    def failed(self, node: Node, what: str) -> None:
        """A stage has failed."""
        self._done(node.id, f"  FAILED  {node.id}: {what}")

    def note(self, text: str) -> None:
        """A line that belongs to no stage."""
        self._print(text)

    def _done(self, key: str, line: str | None) -> None:
        with self._lock:
            self._running.pop(key, None)
            if line is not None:
                self._print(line)
            self._refresh()

    def _print(self, line: str) -> None:
        if self._quiet:
            return
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, overflow="fold")
        else:
            print(line, file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        if self._live:
            self._live.update(_Running(dict(self._running)))


class _Running:
    """What rich draws: each running stage with its elapsed time."""

    def __init__(self, running: dict[str, float]) -> None:
        self._running = running

    def __rich__(self) -> Any:
        from rich.text import Text

        now = time.monotonic()
        return Text("\n".join(f"{now - start:7.1f} s  {key} ..." for key, start in self._running.items()))


def _live() -> Any:
    from rich.console import Console
    from rich.live import Live

    return Live(_Running({}), console=Console(stderr=True), refresh_per_second=8, transient=True)
