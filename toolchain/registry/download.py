"""Brings blobs out of a registry into a layout in the making, and goes on where a transfer broke off."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import IO

from toolchain.artifact import digest_file
from toolchain.bundle.check import damaged
from toolchain.bundle.layout import Descriptor, blob_path
from toolchain.registry.client import BROKEN, Registry, pause
from toolchain.storage import storage_errors

Say = Callable[[str], None]
_CHUNK = 1 << 20
#: Tries in a row that bring not one byte, after which a transfer is given up.
_TRIES = 4


class Download:
    """The blobs of one release.

    Args:
        registry: where they are.
        store: the layout in the making.
        folder: releases, ``NAME/VERSION``, whose blobs may do as well.
        say: told which blobs come.

    Attributes:
        name: of the model, once it is known.
        received: bytes that came over the network.
    """

    def __init__(self, registry: Registry, store: Path, folder: Path, say: Say) -> None:
        self._registry = registry
        self._store = store
        self._folder = folder
        self._say = say
        self._where = str(registry.reference)
        self.name = ""
        self.received = 0

    def fetch(self, descriptor: Descriptor, name: str) -> None:
        """Have a blob in the store: from another version beside this one, or over the network."""
        path = self._store / blob_path(descriptor.digest)
        if path.exists() or self._borrow(descriptor, path):
            return
        self._say(f"{name} ({descriptor.size} bytes)")
        partial = path.with_name(f"{path.name}.part")
        failures = 0
        with storage_errors(self._store), open(partial, "a+b") as file:
            while True:
                before = file.seek(0, os.SEEK_END)
                try:
                    self._receive(descriptor, file, name)
                    break
                except _BrokenOffError as error:
                    failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
                    if failures >= _TRIES:
                        raise self._registry.unreachable(error) from None
                    pause(failures)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _receive(self, descriptor: Descriptor, file: IO[bytes], name: str) -> None:
        """Append to ``file`` what it lacks, and check the whole.

        Raises:
            _BrokenOffError: the connection did; what came is kept.
        """
        file.seek(0)
        state = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            state.update(chunk)
        offset = file.tell()
        if offset < descriptor.size or offset == descriptor.size == 0:
            with _network():
                answer = self._registry.open_blob(descriptor.digest, offset)
            with answer:
                if offset and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
                    # It sends all, from the start.
                    file.truncate(0)
                    offset, state = 0, hashlib.sha256()
                while chunk := _read(answer):
                    offset += len(chunk)
                    self.received += len(chunk)
                    if offset > descriptor.size:
                        break
                    state.update(chunk)
                    file.write(chunk)
        if offset < descriptor.size:
            raise _BrokenOffError(f"the connection ended after {offset} of {descriptor.size} bytes")
        digest = f"sha256:{state.hexdigest()}"
        if offset > descriptor.size or digest != descriptor.digest:
            file.truncate(0)
            got = "more bytes than" if offset > descriptor.size else f"content with digest {digest}, expected"
            raise damaged(f"{name}: the registry sends {got} {descriptor.digest}", self._where)

    def _borrow(self, descriptor: Descriptor, path: Path) -> bool:
        """Link a blob that another version of the model has, if it is what its digest says."""
        if not self.name:
            return False
        for other in self._folder.glob(f"{self.name}/*/{blob_path(descriptor.digest)}"):
            with contextlib.suppress(OSError):
                if other.stat().st_size == descriptor.size and digest_file(other) == descriptor.digest:
                    os.link(other, path)
                    return True
        return False

    def write(self, digest: str, data: bytes) -> None:
        """Have bytes in the store whose digest was checked."""
        path = self._store / blob_path(digest)
        partial = path.with_name(f"{path.name}.part")
        with storage_errors(self._store):
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)


class _BrokenOffError(Exception):
    """The network failed, not the disk."""


@contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _read(answer: HTTPResponse) -> bytes:
    with _network():
        return answer.read1(_CHUNK)
