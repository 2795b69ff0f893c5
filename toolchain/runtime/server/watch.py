"""Follows a folder of releases, ``NAME/VERSION``: loads what comes, unloads what goes."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from toolchain.bundle.layout import INDEX_JSON
from toolchain.errors import ToolchainError
from toolchain.runtime.server.repository import Repository
from toolchain.runtime.server.traffic import version_key

_log = logging.getLogger("toolchain.serve")
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 60.0

#: Inode and modification time of a release's index: another one means another content.
Signature = tuple[int, int]


@dataclass(slots=True)
class _Seen:
    """What was done about a release."""

    signature: Signature
    loaded: bool = False
    failed: bool = False
    pause: float = _FIRST_RETRY
    again_at: float = 0.0


class Watcher:
    """Looks at the folder every ``interval`` seconds.

    A release that cannot be loaded is tried again, after longer and longer pauses: it may still be being copied.
    """

    def __init__(self, repository: Repository, folder: Path, interval: float) -> None:
        self._repository = repository
        self._folder = folder
        self._interval = interval
        self._seen: dict[tuple[str, str], _Seen] = {}
        #: what was loaded -> looks in a row at which its release was not there
        self._missing: dict[tuple[str, str], int] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                # Whatever is wrong with the folder today, it is looked at again.
                _log.exception("the watched folder cannot be read")
            await asyncio.sleep(self._interval)

    async def look(self) -> bool:
        """Look once, and load what is new; returns whether something failed for which an older version may do."""
        failed = False
        found = await asyncio.to_thread(scan, self._folder)
        wanted = self._newest(found)
        # What newer ones took the place of is new again, should they go.
        self._seen = {key: seen for key, seen in self._seen.items() if key in wanted}
        for key, signature in wanted.items():
            seen = self._seen.get(key)
            if seen is None or seen.signature != signature:
                seen = self._seen[key] = _Seen(signature)
            if not seen.loaded and time.monotonic() >= seen.again_at:
                await self._load(key, seen)
                failed |= seen.failed
        self._forget(found)
        return failed

    def _newest(self, found: dict[tuple[str, str], Signature]) -> dict[tuple[str, str], Signature]:
        """The versions of each model that are to be loaded, older ones first; broken ones do not count as kept."""
        by_name: dict[str, list[str]] = {}
        for name, version in found:
            by_name.setdefault(name, []).append(version)
        wanted = []
        for name, versions in by_name.items():
            left = self._repository.settings.model(name).keep_versions
            for version in sorted(versions, key=version_key, reverse=True):
                if left:
                    wanted.append((name, version))
                    seen = self._seen.get((name, version))
                    left -= seen is None or not seen.failed
        return {key: found[key] for key in reversed(wanted)}

    async def _load(self, key: tuple[str, str], seen: _Seen) -> None:
        try:
            await self._repository.add(str(self._folder.joinpath(*key)))
        except ToolchainError as error:
            self._repository.note_broken(*key, error.what)
            seen.again_at = time.monotonic() + seen.pause
            seen.pause = min(_LONGEST_RETRY, seen.pause * 2)
            seen.failed = True
            facts = {"model": key[0], "version": key[1], "reason": error.render(), "again_in_s": seen.pause / 2}
            _log.error("release cannot be loaded", extra={"facts": facts})
        else:
            seen.loaded, seen.failed = True, False
            self._missing[key] = 0

    def _forget(self, found: dict[tuple[str, str], Signature]) -> None:
        """Unload what has gone; it is missed only at the second look, since a replacement is two renames."""
        for key in list(self._missing):
            self._missing[key] = 0 if key in found else self._missing[key] + 1
            if self._missing[key] > 1:
                del self._missing[key]
                self._repository.remove(*key, "its release was removed")


def scan(folder: Path) -> dict[tuple[str, str], Signature]:
    """The releases ``NAME/VERSION`` in a folder; what is hidden is still being written or pulled."""
    found = {}
    for index in folder.glob(f"[!.]*/[!.]*/{INDEX_JSON}"):
        try:
            status = index.stat()
        except OSError:
            continue
        found[index.parent.parent.name, index.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found
