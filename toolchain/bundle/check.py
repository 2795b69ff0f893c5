"""Reads OCI image layouts and believes nothing that a digest does not vouch for.

Every way in which content can be wrong (missing, truncated, one flipped bit, not JSON, of another form) ends in one
:class:`~toolchain.errors.ToolchainError` with code DAMAGED_BUNDLE that names the file.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.artifact import digest_bytes, digest_file
from toolchain.bundle.layout import (
    INDEX_JSON,
    OCI_LAYOUT,
    OCI_LAYOUT_BYTES,
    Descriptor,
    blob_path,
    index_json,
)
from toolchain.errors import ExitCode, ToolchainError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Bound on JSON blobs, so that a hostile layout cannot fill the memory; the OCI distribution spec's own bound.
MAX_JSON_BYTES = 4 << 20


def damaged(what: str, where: Path | str) -> ToolchainError:
    """The error of a layout whose content is not what its digests say."""
    return ToolchainError(what, where=str(where), hint="fetch or build the bundle again", code=ExitCode.DAMAGED_BUNDLE)


def read_index(folder: Path) -> tuple[Descriptor, tuple[Descriptor, ...]]:
    """What ``index.json`` names: the image index, and manifests of signatures; :func:`check_index` checks the rest.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, not a layout, or one of another form.
    """
    if _read_file(folder / OCI_LAYOUT, len(OCI_LAYOUT_BYTES) + 1024) != OCI_LAYOUT_BYTES:
        raise damaged(f"is not {OCI_LAYOUT_BYTES.decode()}", folder / OCI_LAYOUT)
    where = folder / INDEX_JSON
    data = parse_json(_read_file(where, MAX_JSON_BYTES), where)
    manifests = data.get("manifests")
    if not isinstance(manifests, list) or not manifests:
        raise damaged("must name an image index under 'manifests'", where)
    root, *signatures = (parse_descriptor(entry, where) for entry in manifests)
    return root, tuple(signatures)


def check_index(folder: Path, derived: Descriptor, signatures: Sequence[Descriptor]) -> None:
    """Check that ``index.json`` holds just what follows from the image index and the signatures that it names.

    Nothing else vouches for ``index.json``: no digest covers it, so its annotations are compared instead.
    """
    where = folder / INDEX_JSON
    got = parse_json(_read_file(where, MAX_JSON_BYTES), where)
    expected = json.loads(index_json(derived, signatures))
    if got != expected:
        raise damaged(f"does not agree with the image index {derived.short} that it names", where)


def parse_json(data: bytes, where: Path | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, ``data`` is anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(f"is not JSON ({str(error).splitlines()[0]})", where) from None
    if not isinstance(value, dict):
        raise damaged("is not a JSON object", where)
    return value


def parse_descriptor(data: object, where: Path | str) -> Descriptor:
    """A descriptor out of parsed JSON.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, it lacks a field, or holds one of a wrong form or one that we never write.
    """
    known = {"mediaType", "digest", "size", "artifactType", "annotations", "platform"}
    if not isinstance(data, dict) or not known.issuperset(data):
        raise damaged(f"a descriptor must be an object with the keys {', '.join(sorted(known))}", where)
    digest, size, media_type = data.get("digest"), data.get("size"), data.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise damaged(f"a descriptor's digest must be sha256: and 64 lower-case digits, got {digest!r}", where)
    if type(size) is not int or size < 0:
        raise damaged(f"the size of {digest} must be a number of bytes, got {size!r}", where)
    if not isinstance(media_type, str) or not isinstance(data.get("artifactType", ""), str):
        raise damaged(f"the media type of {digest} must be a string", where)
    return Descriptor(
        media_type,
        digest,
        size,
        data.get("artifactType", ""),
        _strings(data.get("annotations", {}), f"the annotations of {digest}", where),
        _strings(data.get("platform", {}), f"the platform of {digest}", where),
    )


def _strings(data: object, name: str, where: Path | str) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise damaged(f"{name} must be an object of strings", where)
    return data


def read_blob(folder: Path, descriptor: Descriptor) -> bytes:
    """The verified bytes of a JSON blob.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, the blob is missing, too large to be one, or not what its digest says.
    """
    path = folder / blob_path(descriptor.digest)
    if descriptor.size > MAX_JSON_BYTES:
        raise damaged(f"has {descriptor.size} bytes, at most {MAX_JSON_BYTES} are allowed for JSON", path)
    size = _regular_size(path)
    if size != descriptor.size:
        raise _mismatch(path, f"has {size} bytes, expected {descriptor.size}")
    data = _read_file(path, descriptor.size)
    digest = digest_bytes(data)
    if digest != descriptor.digest:
        raise _mismatch(path, f"content has digest {digest}, expected {descriptor.digest}")
    return data


def verify_blob(folder: Path, descriptor: Descriptor, name: str = "") -> None:
    """Check size and digest of a blob of any size, reading it in chunks of 1 MiB.

    Args:
        folder: the layout.
        descriptor: what the blob must be.
        name: the file of the bundle that this blob is, for the message.

    Raises:
        ToolchainError: DAMAGED_BUNDLE.
    """
    path = folder / blob_path(descriptor.digest)
    size = _regular_size(path, name)
    if size != descriptor.size:
        raise _mismatch(path, f"has {size} bytes, expected {descriptor.size}", name)
    try:
        digest = digest_file(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if digest != descriptor.digest:
        raise _mismatch(path, f"content has digest {digest}, expected {descriptor.digest}", name)


def _mismatch(path: Path, what: str, name: str = "") -> ToolchainError:
    return damaged(f"{name}: {what}" if name else what, path)


def _regular_size(path: Path, name: str = "") -> int:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(f"{name}: is missing" if name else "is missing", path) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged("is not a regular file", path)
    return status.st_size


def _read_file(path: Path, limit: int) -> bytes:
    """At most ``limit`` + 1 bytes of a regular file, so that an overlong one is noticed and not swallowed."""
    _regular_size(path)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    return data


def unreadable(path: Path, error: OSError) -> ToolchainError:
    return ToolchainError(f"cannot be read: {error.strerror}", where=str(path), code=ExitCode.STORAGE)
