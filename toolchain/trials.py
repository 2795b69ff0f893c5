"""Measurements in children, and what is known of loop nests from one run to the next."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.storage import storage_errors
from toolchain.worker import WorkerPool


class Workers:
    """Calls in children; what happens to a child costs that call only."""

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self._pool, self._folder, self._count = pool, folder, 0

    def call(self, function: str, request: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The result of a call, or None and why there is none."""
        self._count += 1
        reply, log = (self._folder / f"{self._count}.{end}" for end in ("reply", "log"))
        end = self._pool.call("tvm", function, dict(request), reply, log)
        if end.reply is None:
            return None, "took too long" if "SIGALRM" in end.describe() else end.describe()
        if "error" in end.reply:
            return None, str(end.reply["error"]["what"])
        if "exception" in end.reply:
            return None, str(end.reply["exception"]).splitlines()[0]
        result: dict[str, Any] = end.reply["result"]
        return result, ""


class Progress:
    """What is known of loop nests, on disk after each of them."""

    def __init__(self, file: Path, restart: bool) -> None:
        self._file = file
        self._known: dict[str, dict[str, Any]] = {}
        if not restart and file.exists():
            self._known = json.loads(file.read_text())

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a loop nest."""
        return self._known.get(key)

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Add an entry and write the file at once or not at all."""
        self._known[key] = entry
        with storage_errors(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(self._file.name + ".partial")
            partial.write_text(json.dumps(self._known, sort_keys=True, indent=1))
            os.replace(partial, self._file)
