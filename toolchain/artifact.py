"""Digests and artifacts: what a stage made, named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, no NaN.

    File names that are not UTF-8 (lone surrogates in Python) keep a form that ``json.loads`` reads back.

    Raises:
        ValueError: the value holds NaN or an infinity.
        TypeError: the value is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def digest_bytes(data: bytes) -> str:
    """``sha256:<hex>`` of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of the canonical JSON form of ``value``."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """Digest of a file's content, read in chunks of 1 MiB."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return "sha256:" + state.hexdigest()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact: POSIX path relative to the artifact's folder, size in bytes, digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder of files made by a stage.

    ``digest`` covers the names and contents of the files and the ``kind``, nothing else: neither
    times, owners, nor where the folder lies.
    """

    kind: str
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        return digest_json({"kind": self.kind, "files": [[f.path, f.size, f.digest] for f in self.files]})

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(f.size for f in self.files)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": [[f.path, f.size, f.digest] for f in self.files]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Artifact:
        return cls(data["kind"], tuple(FileEntry(*f) for f in data["files"]))

    @classmethod
    def of_folder(cls, kind: str, folder: Path) -> Artifact:
        """The artifact that ``folder`` holds now; symbolic links are followed, empty folders left out."""
        return cls(kind, tuple(_entries(folder, sorted(p for p in folder.rglob("*") if p.is_file()))))


def _entries(folder: Path, paths: Iterable[Path]) -> Iterable[FileEntry]:
    for path in paths:
        yield FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest_file(path))
