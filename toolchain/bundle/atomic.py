"""Replaces a whole folder at once, so that a reader sees the old one or the new one and never a mixture.

The new content is written into a hidden sibling, synced, and swapped in with ``renameat2(RENAME_EXCHANGE)``
(Linux 3.15), or with two renames where the file system lacks it.  A writer holds a lock on its sibling: siblings
that nobody holds were left by a killed process, and the next writer removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from toolchain.bundle.layout import sync_folder
from toolchain.storage import storage_errors

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def replace_folder(folder: Path, write: Callable[[Path], None], choose: str = "another folder") -> None:
    """Make ``folder`` hold exactly what ``write`` writes into the empty folder that it is called with.

    Whatever happens meanwhile (an exception, Ctrl-C, a kill), ``folder`` holds its old content or the whole new one.
    ``choose``: see :func:`toolchain.storage.storage_errors`.

    Raises:
        ToolchainError: STORAGE, the disk is full or not writable.
    """
    folder = Path(os.path.realpath(folder))
    with storage_errors(folder, choose), _parents_of(folder):
        _sweep(folder)
        staging = folder.parent / f"{_prefix(folder)}{secrets.token_hex(8)}"
        lock = -1
        try:
            lock = _locked_folder(staging)
            write(staging)
            sync_folder(staging)
            swap_in(staging, folder)
            sync_folder(folder.parent)
        finally:
            # After the swap, `staging` is the old content.
            _remove(staging)
            if lock >= 0:
                os.close(lock)


@contextlib.contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """The folders above ``folder``; those that had to be made go again if nothing comes into them."""
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:  # the innermost first
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _prefix(folder: Path) -> str:
    return f".{folder.name}.tmp-"


def _locked_folder(path: Path) -> int:
    """Make the folder and lock it; the returned handle keeps the lock.

    A sweeping process may hold the fresh folder for an instant and then remove it: make it again.
    """
    for _ in range(100):
        path.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)
    raise OSError(errno.EBUSY, "another process keeps removing the temporary folder", str(path))


def _sweep(folder: Path) -> None:
    """Remove what killed writers of ``folder`` left behind."""
    for left in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
        try:
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # Just removed by its owner, or not ours to touch.
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # Its writer is alive.
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except (KeyboardInterrupt, OSError) as error:
        # An interrupt inside rmtree, just after it closed a folder, comes out as EBADF (CPython 3.11).
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def swap_in(new: Path, folder: Path) -> None:
    """Put folder ``new`` in the place of ``folder``; an old ``folder`` ends up under the name ``new``."""
    for _ in range(100):
        try:
            # Works when nothing, or an empty folder, is there.
            os.rename(new, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        try:
            if not exchange(new, folder):
                _two_renames(new, folder)
            return
        except FileNotFoundError:
            continue  # Another process removed `folder` in between.
    raise OSError(errno.EBUSY, "another process keeps replacing the folder", str(folder))


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _two_renames(new: Path, folder: Path) -> None:
    """The fallback: for an instant there is no ``folder``; on failure the old one is put back."""
    # Not a name that another writer's sweep would remove.
    aside = folder.with_name(f".{folder.name}.old-{secrets.token_hex(8)}")
    os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(aside, folder)
        raise
    os.rename(aside, new)
