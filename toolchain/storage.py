"""Where things are kept, and what a disk that refuses says."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError

DEFAULT_LIMIT = 20 << 30
"""Bytes the cache may hold before a build prunes it; TOOLCHAIN_CACHE_LIMIT_MB overrides it."""

ANOTHER_CACHE = "another cache folder (--cache or TOOLCHAIN_CACHE)"
"""For :func:`storage_errors` below the stage cache."""


def default_folder() -> Path:
    """``$TOOLCHAIN_CACHE`` or the user's cache folder."""
    if value := os.environ.get("TOOLCHAIN_CACHE"):
        return Path(value)
    import platformdirs

    return Path(platformdirs.user_cache_dir("toolchain", appauthor=False))


def default_limit() -> int:
    """Bytes; from TOOLCHAIN_CACHE_LIMIT_MB or :data:`DEFAULT_LIMIT`.

    Raises:
        ToolchainError: USAGE when the variable is not a whole number.
    """
    value = os.environ.get("TOOLCHAIN_CACHE_LIMIT_MB")
    if value is None:
        return DEFAULT_LIMIT
    if not value.strip().isdecimal():
        raise ToolchainError(
            f"got {value!r}, allowed: a whole number of MiB", where="TOOLCHAIN_CACHE_LIMIT_MB", code=ExitCode.USAGE
        )
    return int(value) << 20


@contextlib.contextmanager
def storage_errors(folder: Path, choose: str = "another folder") -> Iterator[None]:
    """Turn a full or broken disk, a read-only or forbidden folder, or a file in its place into one clear error.

    Args:
        folder: named where the error names no file.
        choose: what the user may choose instead, e.g. ``"another --output folder"``.

    Raises:
        ToolchainError: STORAGE.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, hint = "no space left on the disk", f"free some space or choose {choose}, then run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, hint = "this folder cannot be written", f"choose {choose}"
        elif error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
            # /proc and the like answer ENOENT to whoever would make a file or folder in them.
            what, hint = "nothing can be made here", f"choose {choose}"
        elif error.errno == errno.EISDIR:
            what, hint = "a file is needed here, this is a folder", "give the path of a file"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            what, hint = "a folder is needed here", f"choose {choose}"
        elif error.errno == errno.EFBIG:
            what, hint = "the file is larger than this disk or a limit (ulimit -f) allows", f"choose {choose}"
        elif error.errno == errno.EIO:
            what, hint = "the disk does not work", "look at the system's log (dmesg)"
        else:
            raise
        raise ToolchainError(
            f"{what} ({error.strerror})", where=str(error.filename or folder), hint=hint, code=ExitCode.STORAGE
        ) from error


def check_can_be_made(folder: Path, choose: str) -> None:
    """Refuse early what :func:`storage_errors` would refuse late: a ``folder`` that is not there and can't be made.

    Raises:
        ToolchainError: STORAGE.
    """
    if folder.is_dir():
        return
    with storage_errors(folder, choose):
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
