"""The stage cache: a plain folder of content-addressed artifacts and of records that lead to them.

Layout below the cache folder, all of it safe to copy to another machine::

    v1/artifacts/<sha256>/...          one folder per artifact, with its files under their own names
    v1/records/<key>/<digest>.json     what a stage made for a key, with the dependencies to re-check
    v1/last/<name>.json                the newest record of each node of a recipe, for `toolchain why`
    v1/digests.json                    file digests by (path, size, inode, times): a mere shortcut
    v1/locks/, v1/in-use               locks

Everything appears by a rename, so a reader never sees a half-written entry; an entry that does not
match its digests is dropped and made again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.artifact import Artifact, canonical_json, digest_bytes, digest_file
from toolchain.errors import ExitCode, ToolchainError

DEFAULT_LIMIT = 20 << 30
"""Bytes the cache may hold before a build prunes it; TOOLCHAIN_CACHE_LIMIT_MB overrides it."""

_RECORDS_PER_KEY = 16
_SETTLED_NS = 50_000_000  # a file younger than this may still change without its times changing


def default_folder() -> Path:
    """``$TOOLCHAIN_CACHE`` or the user's cache folder."""
    if value := os.environ.get("TOOLCHAIN_CACHE"):
        return Path(value)
    import platformdirs

    return Path(platformdirs.user_cache_dir("toolchain", appauthor=False))


def default_limit() -> int:
    """Bytes; from TOOLCHAIN_CACHE_LIMIT_MB or :data:`DEFAULT_LIMIT`."""
    value = os.environ.get("TOOLCHAIN_CACHE_LIMIT_MB")
    if value is None:
        return DEFAULT_LIMIT
    try:
        return int(value) << 20
    except ValueError:
        raise ToolchainError(
            f"got {value!r}, allowed: a whole number of MiB", where="TOOLCHAIN_CACHE_LIMIT_MB", code=ExitCode.USAGE
        ) from None


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, a read-only or forbidden folder into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, hint = "no space left on the disk", "free some space or choose another folder, then run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, hint = "this folder cannot be written", "choose another folder (--output, --cache or TOOLCHAIN_CACHE)"
        else:
            raise
        raise ToolchainError(
            f"{what} ({error.strerror})", where=str(error.filename or folder), hint=hint, code=ExitCode.STORAGE
        ) from error


@dataclass(frozen=True, slots=True)
class Record:
    """What one run of a stage made.

    Attributes:
        key: digest of ``components``.
        components: everything known beforehand that can change the result, by name.
        dependencies: ``[kind, name, digest]`` found out while it ran.
        outputs: output name -> artifact.
        refused: why there are no outputs, if the stage refused.
    """

    key: str
    components: dict[str, Any]
    dependencies: tuple[tuple[str, str, str], ...]
    outputs: dict[str, Artifact]
    facts: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "components": self.components,
            "dependencies": [list(d) for d in self.dependencies],
            "outputs": {name: artifact.to_json() for name, artifact in self.outputs.items()},
            "facts": self.facts,
            "refused": self.refused,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        return cls(
            data["key"],
            data["components"],
            tuple((kind, name, digest) for kind, name, digest in data["dependencies"]),
            {name: Artifact.from_json(value) for name, value in data["outputs"].items()},
            data["facts"],
            data["refused"],
        )


class Cache:
    """One cache folder.  Safe for several threads and processes at once."""

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder.absolute() / "v1"
        self.limit = limit
        self._digests = DigestStore(self.folder / "digests.json")
        with storage_errors(folder):
            for name in ("artifacts", "records", "last", "locks", "tmp"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    # ---- artifacts ----

    def add(self, kind: str, folder: Path) -> Artifact:
        """Take ``folder`` (on the cache's file system: see :meth:`scratch`) into the cache."""
        with storage_errors(self.folder):
            artifact = Artifact.of_folder(kind, folder)
            target = self._artifact_folder(artifact)
            if target.exists() and not self._sound(artifact):
                self._discard(target)
            if target.exists():
                shutil.rmtree(folder)
                return artifact
            for entry in artifact.files:
                _flush(folder / entry.path)
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(folder)  # another process was quicker with the same content
        return artifact

    def path(self, artifact: Artifact) -> Path:
        """The folder of an artifact in the cache; it must have been checked by :meth:`has`."""
        return self._artifact_folder(artifact)

    def has(self, artifact: Artifact) -> bool:
        """Whether the artifact is there and whole; a damaged one is removed."""
        target = self._artifact_folder(artifact)
        if not target.is_dir():
            return False
        if self._sound(artifact):
            return True
        self._discard(target)
        return False

    def _sound(self, artifact: Artifact) -> bool:
        folder = self._artifact_folder(artifact)
        try:
            return all(
                (folder / f.path).stat().st_size == f.size and self.digest(folder / f.path) == f.digest
                for f in artifact.files
            )
        except OSError:
            return False

    def _artifact_folder(self, artifact: Artifact) -> Path:
        return self.folder / "artifacts" / artifact.digest.removeprefix("sha256:")

    def _discard(self, folder: Path) -> None:
        grave = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
        with contextlib.suppress(OSError):
            os.rename(folder, grave / "x")
        shutil.rmtree(grave, ignore_errors=True)

    # ---- records ----

    def records(self, key: str) -> list[Record]:
        """The records of ``key``, newest first; unreadable ones are removed."""
        folder = self.folder / "records" / key.removeprefix("sha256:")
        found: list[tuple[int, Record]] = []
        for path in folder.glob("*.json") if folder.is_dir() else ():
            try:
                found.append((path.stat().st_mtime_ns, Record.from_json(json.loads(path.read_bytes()))))
            except (ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
        return [record for _, record in sorted(found, key=lambda item: -item[0])]

    def put(self, record: Record) -> None:
        folder = self.folder / "records" / record.key.removeprefix("sha256:")
        with storage_errors(self.folder):
            folder.mkdir(exist_ok=True)
            self._write(self._record_path(record), canonical_json(record.to_json()))
            old = sorted(folder.glob("*.json"), key=lambda p: -p.stat().st_mtime_ns)[_RECORDS_PER_KEY:]
        for path in old:
            path.unlink(missing_ok=True)

    def used(self, record: Record) -> None:
        """Mark a record as used now, for pruning."""
        with contextlib.suppress(OSError):
            os.utime(self._record_path(record))

    def _record_path(self, record: Record) -> Path:
        name = digest_bytes(canonical_json([list(d) for d in record.dependencies])).removeprefix("sha256:")
        return self.folder / "records" / record.key.removeprefix("sha256:") / f"{name[:32]}.json"

    def last(self, name: str) -> Record | None:
        """The newest record noted under ``name`` by :meth:`note_last`."""
        try:
            return Record.from_json(json.loads((self.folder / "last" / f"{_slug(name)}.json").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note_last(self, name: str, record: Record) -> None:
        path, data = self.folder / "last" / f"{_slug(name)}.json", canonical_json(record.to_json())
        with contextlib.suppress(OSError):
            if path.exists() and path.read_bytes() == data:
                return
        with storage_errors(self.folder):
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self.folder / "tmp", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    # ---- digests, locks, space ----

    def digest(self, path: Path) -> str:
        """Digest of a file, read again only if its size, inode or times changed since the last time."""
        return self._digests.digest(path)

    def save_digests(self) -> None:
        with contextlib.suppress(OSError):
            self._digests.save(self.folder / "tmp")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder on the cache's file system, removed at the end."""
        with storage_errors(self.folder):
            folder = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key, so that two builds do the same work once."""
        import filelock

        with filelock.FileLock(self.folder / "locks" / key.removeprefix("sha256:")[:32], thread_local=False):
            yield

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep :meth:`prune` of other processes away for the duration of a build."""
        with storage_errors(self.folder), open(self.folder / "in-use", "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def size(self) -> dict[str, int]:
        """``{"bytes", "artifacts", "records"}``."""
        total, artifacts = 0, 0
        for folder in (self.folder / "artifacts").iterdir():
            artifacts += 1
            total += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        records = list((self.folder / "records").glob("*/*.json"))
        total += sum(p.stat().st_size for p in records)
        return {"bytes": total, "artifacts": artifacts, "records": len(records)}

    def prune(self, limit: int) -> dict[str, int] | None:
        """Remove the least recently used records, then artifacts that no record names, down to ``limit`` bytes.

        Returns:
            ``{"removed_records", "removed_artifacts", "freed_bytes", "bytes"}``, or None when another
            build is using the cache.
        """
        with open(self.folder / "in-use", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return self._prune(limit)

    def _prune(self, limit: int) -> dict[str, int]:
        ages: list[tuple[float, Path, set[str], int]] = []
        for path in (self.folder / "records").glob("*/*.json"):
            try:
                record = Record.from_json(json.loads(path.read_bytes()))
            except (OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
                continue
            names = {a.digest.removeprefix("sha256:") for a in record.outputs.values()}
            ages.append((path.stat().st_mtime, path, names, path.stat().st_size))
        sizes = {
            folder.name: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            for folder in (self.folder / "artifacts").iterdir()
        }
        keep, total, removed = set[str](), 0, 0
        for _, path, names, size in sorted(ages, key=lambda item: -item[0]):
            cost = size + sum(sizes.get(name, 0) for name in names - keep)
            if total + cost <= limit:
                keep |= names
                total += cost
            else:
                path.unlink(missing_ok=True)
                removed += 1
        dropped = [name for name in sizes if name not in keep]
        for name in dropped:
            self._discard(self.folder / "artifacts" / name)
        self._clear_leftovers()
        freed = sum(sizes[name] for name in dropped)
        return {"removed_records": removed, "removed_artifacts": len(dropped), "freed_bytes": freed, "bytes": total}

    def _clear_leftovers(self) -> None:
        # What a killed build left in tmp; the exclusive lock says that nobody is using it.
        for path in (self.folder / "tmp").iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class DigestStore:
    """Digests of files remembered by (path, size, inode, modification and change time)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] | None = None
        self._changed = False

    def digest(self, path: Path) -> str:
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
        if not self._changed or self._known is None:
            return
        # Another build may have saved meanwhile: keep both, ours wins; forget files that are gone.
        merged = {**self._load(), **self._known}
        if len(merged) > 5000:
            merged = {path: entry for path, entry in merged.items() if os.path.exists(path)}
        with tempfile.NamedTemporaryFile("w", dir=scratch, delete=False) as file:
            json.dump(merged, file)
        os.replace(file.name, self._path)
        self._changed = False

    def _load(self) -> dict[str, list[Any]]:
        try:
            data = json.loads(self._path.read_bytes())
            return {k: v for k, v in data.items() if isinstance(v, list) and len(v) == 5}
        except (OSError, ValueError, AttributeError):
            return {}


def _slug(name: str) -> str:
    return digest_bytes(name.encode()).removeprefix("sha256:")[:32]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
