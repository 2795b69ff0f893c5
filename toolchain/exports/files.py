"""What an export writes: a tree of files, put at its place as a whole or not at all, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolchain.bundle.atomic import replace_folder
from toolchain.bundle.check import damaged
from toolchain.bundle.layout import Blob, blob_of_bytes, sync_folder
from toolchain.bundle.names import name_conflicts
from toolchain.errors import ExitCode, ToolchainError
from toolchain.storage import storage_errors

#: POSIX path inside the export -> content.
Tree = Mapping[str, Blob]

_CHUNK = 1 << 20


def text_file(text: str) -> Blob:
    return blob_of_bytes(text.encode())


def json_file(value: Any) -> Blob:
    """Indented JSON for people, with the keys in the order given."""
    return text_file(json.dumps(value, indent=2) + "\n")


def yaml_file(*documents: Mapping[str, Any]) -> Blob:
    """YAML of JSON values; strings are quoted as JSON, which YAML contains."""
    return text_file("---\n".join("\n".join(_yaml(document)) + "\n" for document in documents))


def _yaml(value: Any, indent: str = "") -> Iterable[str]:
    items = value.items() if isinstance(value, Mapping) else [(None, item) for item in value]
    for key, item in items:
        head = f"{indent}-" if key is None else f"{indent}{key if _plain(key) else json.dumps(key)}:"
        if not isinstance(item, (Mapping, list)) or not item:
            yield f"{head} {json.dumps(item)}"
            continue
        lines = list(_yaml(item, indent + "  "))
        if key is None:
            # The first line of an entry stands beside its dash.
            lines[0] = f"{head} {lines[0].lstrip()}"
        else:
            yield head
        yield from lines


def _plain(key: str) -> bool:
    return all(part.isidentifier() for part in key.split("-")) and key not in ("y", "n", "yes", "no", "on", "off")


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse to write over what is there, and with ``force`` what nobody can mean to replace.

    Raises:
        ToolchainError: USAGE.
    """
    place = Path(os.path.realpath(folder))
    with storage_errors(folder):
        if place.exists() and not place.is_dir():
            raise ToolchainError("is a file; a folder is needed", where=str(folder), code=ExitCode.USAGE)
        if not place.is_dir() or not any(place.iterdir()):
            return
    if not force:
        raise ToolchainError(
            "is not empty",
            where=str(folder),
            hint="name another folder, or replace all it holds with --force",
            code=ExitCode.USAGE,
        )
    kept = {Path.cwd(): "the current folder", Path(os.path.realpath(Path.home())): "your home folder"}
    for each, what in kept.items():
        if each == place or place in each.parents:
            raise ToolchainError(
                f"holds {what}, which --force does not replace",
                where=str(folder),
                hint="name another folder",
                code=ExitCode.USAGE,
            )
    if (place / ".git").exists():
        raise ToolchainError(
            "is a Git repository, which --force does not replace",
            where=str(folder),
            hint="name a folder inside it",
            code=ExitCode.USAGE,
        )


def write_tree(tree: Tree, folder: Path, *, force: bool = False, programs: frozenset[str] = frozenset()) -> None:
    """Make ``folder`` hold exactly ``tree``; on any failure, Ctrl-C included, it stays as it was.

    Files are copied, and their digests checked while they are.  Those named in ``programs`` may be executed.

    Raises:
        ToolchainError: USAGE, ``folder`` is not empty and ``force`` not given; DAMAGED_BUNDLE, a file of the bundle
            changed meanwhile; STORAGE.
    """
    conflicts = name_conflicts(tree)
    if conflicts:
        raise ToolchainError(f"the export would hold unsafe file names: {conflicts[0]}", code=ExitCode.INTERNAL)
    check_folder(folder, force=force)
    replace_folder(folder, lambda staging: _fill(tree, staging, programs))


def _fill(tree: Tree, folder: Path, programs: frozenset[str]) -> None:
    folder.chmod(0o755)
    for name, blob in sorted(tree.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(blob, path)
        path.chmod(0o755 if name in programs else 0o644)
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        # Whatever the mask: a server often runs as another user.
        inner.chmod(0o755)
        sync_folder(inner)


def _write(blob: Blob, path: Path) -> None:
    with open(path, "xb") as output:
        if isinstance(blob.source, bytes):
            output.write(blob.source)
        else:
            state = hashlib.sha256()
            with open(blob.source, "rb") as source:
                while chunk := source.read(_CHUNK):
                    state.update(chunk)
                    output.write(chunk)
            if f"sha256:{state.hexdigest()}" != blob.digest:
                raise damaged("changed while it was copied", blob.source)
        output.flush()
        os.fsync(output.fileno())
