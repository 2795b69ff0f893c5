"""Writes the files of a scaffold: all of them, or none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError
from toolchain.scaffold import Scaffold
from toolchain.storage import storage_errors


def write_scaffold(scaffold: Scaffold, force: bool) -> None:
    """Write all files, or none if one exists and ``force`` is false.

    Raises:
        ToolchainError: USAGE when a file exists, STORAGE when one cannot be written.
    """
    existing = [path for path in scaffold.files if os.path.lexists(path)]
    if existing and not force:
        raise ToolchainError(
            "nothing was written, as these files exist:",
            details=[str(path) for path in existing],
            hint="--force replaces them; for another model, --name NAME gives its files another name",
            code=ExitCode.USAGE,
        )
    texts = {**scaffold.files, **scaffold.extended}
    for path in texts:
        _check_place(path)
    for path, text in texts.items():
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".init-") as scratch:
                new = Path(scratch) / path.name
                new.write_text(text, encoding="utf-8", errors="surrogateescape")
                os.replace(new, path)


def _check_place(path: Path) -> None:
    parent = next(p for p in path.parents if os.path.lexists(p))
    if path.is_dir():
        problem, where = "a folder is in the way of a file to be written", path
    elif not parent.is_dir():
        problem, where = "a file is in the way of a folder to be made", parent
    elif not os.access(parent, os.W_OK | os.X_OK):
        problem, where = "this folder cannot be written", parent
    else:
        return
    raise ToolchainError(
        f"nothing was written: {problem}",
        where=str(where),
        hint="move it away, or name another file with --output",
        code=ExitCode.STORAGE,
    )
