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
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from toolchain.artifact import Artifact, canonical_json, digest_bytes
from toolchain.digests import DigestStore
from toolchain.errors import ExitCode, ToolchainError
from toolchain.prune import bytes_held, prune
from toolchain.record import BAD_RECORD, Record
from toolchain.storage import ANOTHER_CACHE, DEFAULT_LIMIT, default_folder, default_limit, storage_errors

__all__ = [
    "DEFAULT_LIMIT",
    "Cache",
    "DigestStore",
    "Record",
    "default_folder",
    "default_limit",
    "storage_errors",
]

_RECORDS_PER_KEY = 16


class Cache:
    """One cache folder.  Safe for several threads and processes at once."""

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder.absolute() / "v1"
        self.limit = limit
        self._digests = DigestStore(self.folder / "digests.json")
        with storage_errors(folder, ANOTHER_CACHE):
            for name in ("artifacts", "records", "last", "locks", "tmp"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    # ---- artifacts ----

    def add(self, kind: str, folder: Path) -> Artifact:
        """Take ``folder`` (on the cache's file system: see :meth:`scratch`) into the cache.

        Raises:
            ToolchainError: STORAGE when the disk is full or the cache cannot be written.
        """
        with storage_errors(self.folder, ANOTHER_CACHE):
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
        # Moved away first, so that nobody meets it half removed.
        with storage_errors(self.folder, ANOTHER_CACHE):
            grave = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, grave / "x")
        shutil.rmtree(grave, ignore_errors=True)

    # ---- records ----

    def records(self, key: str) -> list[Record]:
        """The records of ``key``, newest first; unreadable ones are removed."""
        folder = self.folder / "records" / key.removeprefix("sha256:")
        found: list[tuple[int, Record]] = []
        for path in folder.glob("*.json") if folder.is_dir() else ():
            try:
                found.append((path.stat().st_mtime_ns, Record.decode(path.read_bytes())))
            except BAD_RECORD:
                with contextlib.suppress(OSError):
                    path.unlink()
            except FileNotFoundError:
                continue
        return [record for _, record in sorted(found, key=lambda item: -item[0])]

    def put(self, record: Record) -> None:
        """Add a record; the oldest of its key go when there are too many.

        Raises:
            ToolchainError: STORAGE.
        """
        folder = self.folder / "records" / record.key.removeprefix("sha256:")
        with storage_errors(self.folder, ANOTHER_CACHE):
            folder.mkdir(exist_ok=True)
            self._write(self._record_path(record), record.encode())
            ages = sorted((-path.stat().st_mtime_ns, path) for path in folder.glob("*.json"))
            for _, path in ages[_RECORDS_PER_KEY:]:
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
            return Record.decode((self.folder / "last" / f"{_slug(name)}.json").read_bytes())
        except (OSError, *BAD_RECORD):
            return None

    def note_last(self, name: str, record: Record) -> None:
        """Note the newest record of a node, under a name that means the same in the next build."""
        path, data = self.folder / "last" / f"{_slug(name)}.json", record.encode()
        with contextlib.suppress(OSError):
            if path.exists() and path.read_bytes() == data:
                return
        with storage_errors(self.folder, ANOTHER_CACHE):
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, name = tempfile.mkstemp(dir=self.folder / "tmp")
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    # ---- digests, locks, space ----

    def digest(self, path: Path) -> str:
        """Digest of a file, read again only if its size, inode or times changed since the last time."""
        return self._digests.digest(path)

    def save_digests(self) -> None:
        """Keep the digests for the next build; if that fails, it computes them again."""
        with contextlib.suppress(OSError):
            self._digests.save(self.folder / "tmp")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder on the cache's file system, removed at the end."""
        with storage_errors(self.folder, ANOTHER_CACHE):
            folder = Path(tempfile.mkdtemp(dir=self.folder / "tmp"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the lock of a key, so that two builds do the same work once.

        Args:
            key: a record's key.
            stop: asked while another build holds the lock: whether to give up waiting.

        Raises:
            ToolchainError: INTERRUPTED when ``stop`` says so, STORAGE when the cache cannot be written.
        """
        import filelock

        lock = filelock.FileLock(self.folder / "locks" / key.removeprefix("sha256:")[:32], thread_local=False)
        with storage_errors(self.folder, ANOTHER_CACHE):
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=0.3)
                except filelock.Timeout:
                    if stop():
                        raise ToolchainError("the build was interrupted", code=ExitCode.INTERRUPTED) from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep :meth:`prune` of other processes away for the duration of a build.

        Raises:
            ToolchainError: STORAGE when the cache cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with storage_errors(self.folder, ANOTHER_CACHE):
                file = stack.enter_context(open(self.folder / "in-use", "a"))
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def size(self) -> dict[str, int]:
        """``{"bytes", "artifacts", "records"}``."""
        return bytes_held(self.folder)

    def prune(self, limit: int) -> dict[str, int] | None:
        """Remove the least recently used records, then artifacts that no record names, down to ``limit`` bytes.

        Returns:
            ``{"removed_records", "removed_artifacts", "freed_bytes", "bytes"}``, or None when another
            build is using the cache.

        Raises:
            ToolchainError: STORAGE when the cache cannot be written.
        """
        with storage_errors(self.folder, ANOTHER_CACHE), open(self.folder / "in-use", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return prune(self.folder, limit, self._discard)


def _slug(name: str) -> str:
    return digest_bytes(name.encode()).removeprefix("sha256:")[:32]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
