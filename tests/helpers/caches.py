"""Putting things into a cache and looking at it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from toolchain.artifact import Artifact, digest_json
from toolchain.cache import Cache, Record


def add(cache: Cache, kind: str = "text", **files: str) -> Artifact:
    """Put an artifact with these files into the cache."""
    with cache.scratch() as scratch:
        folder = scratch / "out"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return cache.add(kind, folder)


def put(cache: Cache, name: str, artifact: Artifact, age: float = 0.0) -> Record:
    """Put a record of that name, last used ``age`` seconds ago."""
    components = {"stage": name}
    record = Record(digest_json(components), components, (), {artifact.kind: artifact}, {"name": name})
    cache.put(record)
    then = time.time() - age
    os.utime(record_file(cache, record), (then, then))
    return record


def record_file(cache: Cache, record: Record) -> Path:
    (path,) = (cache.folder / "records" / record.key.removeprefix("sha256:")).iterdir()
    return path


def leftovers(cache: Cache) -> list[Path]:
    return list((cache.folder / "tmp").iterdir())
