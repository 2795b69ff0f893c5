"""OCI image layouts: content-addressed blobs, canonical JSON, nothing that depends on machine, user or time.

The form is that of the OCI image specification 1.1 (``image-layout.md``, ``descriptor.md``): a file ``oci-layout``,
a file ``index.json`` and ``blobs/sha256/<hex>``.  Ours is narrower, so that every bit of it can be checked:
``index.json`` names exactly one image index and signatures of it, and holds nothing that cannot be derived from them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain.artifact import canonical_json, digest_bytes, digest_file
from toolchain.bundle.media import ANNOTATION_KIND, KIND_SIGNED
from toolchain.errors import ExitCode, ToolchainError

OCI_LAYOUT = "oci-layout"
INDEX_JSON = "index.json"
MEDIA_TYPE_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_TYPE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"

OCI_LAYOUT_BYTES = canonical_json({"imageLayoutVersion": "1.0.0"})
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI content descriptor: what a blob is, its digest (``sha256:<hex>``) and its size in bytes."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            data["artifactType"] = self.artifact_type
        if self.annotations:
            data["annotations"] = dict(self.annotations)
        if self.platform:
            data["platform"] = dict(self.platform)
        return data

    @property
    def short(self) -> str:
        """The digest as shown in messages: ``sha256:`` and 12 hexadecimal digits."""
        return self.digest[:19]


@dataclass(frozen=True, slots=True)
class Blob:
    """Content to be written: a file of this machine, or bytes; with its digest and its size in bytes."""

    digest: str
    size: int
    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole layout before it is written: the image index it is about, every blob by digest, and its signatures."""

    root: Descriptor
    blobs: Mapping[str, Blob]
    signatures: Sequence[Descriptor] = ()

    def files(self) -> dict[str, Blob]:
        """POSIX path inside the layout -> content, for every file of the layout."""
        index = index_json(self.root, self.signatures)
        files = {blob_path(blob.digest): blob for blob in self.blobs.values()}
        files[OCI_LAYOUT] = blob_of_bytes(OCI_LAYOUT_BYTES)
        files[INDEX_JSON] = blob_of_bytes(index)
        return files


def blob_of_bytes(data: bytes) -> Blob:
    return Blob(digest_bytes(data), len(data), data)


def blob_of_file(path: Path) -> Blob:
    """The blob of a file, hashed now; :func:`write_layout` notices when it changes before it is copied."""
    return Blob(digest_file(path), path.stat().st_size, path)


def blob_path(digest: str) -> str:
    """Path inside a layout of the blob with this digest."""
    algorithm, _, value = digest.partition(":")
    return f"blobs/{algorithm}/{value}"


def index_json(root: Descriptor, signatures: Sequence[Descriptor] = ()) -> bytes:
    """The bytes of ``index.json`` of a layout about ``root``, with the manifests of signatures of it."""
    if signatures:
        # By this cosign finds what is signed; without signatures the file is as it always was.
        root = replace(root, annotations={**root.annotations, ANNOTATION_KIND: KIND_SIGNED})
    manifests = [descriptor.to_json() for descriptor in (root, *signatures)]
    return canonical_json({"schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": manifests})


def write_layout(layout: Layout, folder: Path, *, link: bool = False) -> None:
    """Write ``layout`` into an existing empty ``folder``, each file synced to the disk.

    ``link``: files were checked and synced already, and are linked instead of copied where that is possible.

    Raises:
        ToolchainError: STORAGE, a source file changed since it was hashed.
        OSError: the disk is full, or not writable.
    """
    folders = {folder}
    for path, blob in sorted(layout.files().items()):
        destination = folder / path
        destination.parent.mkdir(parents=True, exist_ok=True)
        folders.update({destination.parent, destination.parent.parent})
        if not (link and isinstance(blob.source, Path) and _linked(blob.source, destination)):
            _write_blob(blob, destination)
    for each in folders:
        if each.is_relative_to(folder):
            sync_folder(each)


def _linked(source: Path, destination: Path) -> bool:
    try:
        os.link(source, destination)
    except OSError:
        return False  # Another file system, or one without hard links.
    return True


def _write_blob(blob: Blob, destination: Path) -> None:
    state = hashlib.sha256()
    with open(destination, "xb") as output:
        if isinstance(blob.source, bytes):
            state.update(blob.source)
            output.write(blob.source)
        else:
            with open(blob.source, "rb") as source:
                while chunk := source.read(_CHUNK):
                    state.update(chunk)
                    output.write(chunk)
        output.flush()
        os.fsync(output.fileno())
    got = "sha256:" + state.hexdigest()
    if got != blob.digest:
        raise ToolchainError(
            f"the file changed while it was packed: it was {blob.digest}, now it is {got}",
            where=str(blob.source) if isinstance(blob.source, Path) else "",
            hint="build again; nothing else may write to that file meanwhile",
            code=ExitCode.STORAGE,
        )


def sync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
