"""File digests, each computed once as long as the file stays what it is."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from toolchain.artifact import digest_file

_SETTLED_NS = 50_000_000  # a file younger than this may still change without its times changing


class DigestStore:
    """Digests of files remembered by (path, size, inode, modification and change time)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] | None = None
        self._changed = False

    def digest(self, path: Path) -> str:
        """Digest of the file's content.

        Raises:
            OSError: it cannot be read.
        """
        if self._known is None:
            self._known = self._load()
        info = path.stat()
        stamp = [info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:4] == stamp:
            return str(known[4])
        digest = digest_file(path)
        if time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > _SETTLED_NS:
            self._known[str(path)] = [*stamp, digest]
            self._changed = True
        return digest

    def save(self, scratch: Path) -> None:
        """Write what was learnt; ``scratch`` is a folder on the same file system.

        Raises:
            OSError: it cannot be written; nothing is left behind.
        """
        if not self._changed or self._known is None:
            return
        # Another build may have saved meanwhile: keep both, ours wins; forget files that are gone.
        merged = {**self._load(), **self._known}
        if len(merged) > 5000:
            merged = {path: entry for path, entry in merged.items() if os.path.exists(path)}
        descriptor, name = tempfile.mkstemp(dir=scratch)
        try:
            with open(descriptor, "w") as file:
                json.dump(merged, file)
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._changed = False

    def _load(self) -> dict[str, list[Any]]:
        try:
            data = json.loads(self._path.read_bytes())
            return {k: v for k, v in data.items() if isinstance(v, list) and len(v) == 5}
        except (OSError, ValueError, AttributeError):
            return {}
