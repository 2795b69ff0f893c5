"""Space in a stage cache: how much is taken, and what goes first."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from toolchain.record import BAD_RECORD, Record


def bytes_held(folder: Path) -> dict[str, int]:
    """``{"bytes", "artifacts", "records"}`` of the cache in ``folder``."""
    artifacts = [_bytes_below(path) for path in (folder / "artifacts").iterdir()]
    records = [_bytes_of(path) for path in (folder / "records").glob("*/*.json")]
    return {"bytes": sum(artifacts) + sum(records), "artifacts": len(artifacts), "records": len(records)}


def prune(folder: Path, limit: int, discard: Callable[[Path], None]) -> dict[str, int]:
    """Remove the least recently used records, then artifacts that no record names, down to ``limit`` bytes.

    The caller holds the cache's exclusive lock: nothing else uses the cache meanwhile.

    Args:
        folder: of the cache.
        limit: bytes that may stay.
        discard: removes an artifact's folder at once.

    Returns:
        ``{"removed_records", "removed_artifacts", "freed_bytes", "bytes"}``.
    """
    before = bytes_held(folder)["bytes"]
    sizes = {path.name: _bytes_below(path) for path in (folder / "artifacts").iterdir()}
    keep, total, removed, full = set[str](), 0, 0, False
    for path, record in _by_last_use(folder):
        cost = _bytes_of(path) + sum(sizes.get(name, 0) for name in record.artifact_names - keep)
        full = full or total + cost > limit
        if full:
            path.unlink(missing_ok=True)
            removed += 1
        else:
            keep |= record.artifact_names
            total += cost
    dropped = sizes.keys() - keep
    for name in dropped:
        discard(folder / "artifacts" / name)
    _clear_leftovers(folder)
    freed = before - total
    return {"removed_records": removed, "removed_artifacts": len(dropped), "freed_bytes": freed, "bytes": total}


def _by_last_use(folder: Path) -> list[tuple[Path, Record]]:
    """All records, the last used first; unreadable ones are removed."""
    found: list[tuple[int, Path, Record]] = []
    for path in (folder / "records").glob("*/*.json"):
        try:
            found.append((path.stat().st_mtime_ns, path, Record.decode(path.read_bytes())))
        except (OSError, *BAD_RECORD):
            path.unlink(missing_ok=True)
    return [(path, record) for _, path, record in sorted(found, key=lambda item: (-item[0], item[1]))]


def _clear_leftovers(folder: Path) -> None:
    # What a killed build left in tmp, and locks: as no build runs, nobody holds or writes them.
    for path in [*(folder / "tmp").iterdir(), *(folder / "locks").iterdir()]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "records").iterdir():
        with contextlib.suppress(OSError):
            path.rmdir()  # only the empty ones


def _bytes_below(folder: Path) -> int:
    return sum(_bytes_of(path) for path in folder.rglob("*") if path.is_file())


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has just removed it
        return 0
