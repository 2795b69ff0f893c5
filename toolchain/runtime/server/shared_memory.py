"""Triton's system shared memory extension: tensors in POSIX shared memory that a client on this machine made.

Regions are read and written with ``pread`` and ``pwrite``, not mapped: a client that shortens its memory object while
the server uses it would end the server with SIGBUS, and one that changes a tensor after it was checked would get past
the checks.  The price is one copy at memory speed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.datatypes import invalid

FOLDER = Path("/dev/shm")
MAX_REGIONS = 1024
_MAX_KEY = 255


class Region(NamedTuple):
    """One registered region: ``size`` bytes from ``offset`` of the memory object ``key``, open as ``descriptor``."""

    name: str
    key: str
    offset: int
    size: int
    descriptor: int

    def status(self) -> dict[str, str | int]:
        """What the status call says of it."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.size}


class Place(NamedTuple):
    """Where in a region a tensor lies, or an output is to be put."""

    region: str
    offset: int
    size: int


class SharedMemory:
    """The regions that clients registered, over REST and gRPC alike."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Register part of a memory object.

        Raises:
            ServeError: FORBIDDEN, shared memory is off; INVALID, the name is taken, there is no such memory object, or
                it is smaller than said.
        """
        self._check_allowed()
        if not name:
            invalid("a shared memory region needs a name")
        if name in self._regions:
            invalid(f"shared memory region {name!r} is registered already; unregister it first")
        if len(self._regions) >= MAX_REGIONS:
            raise ServeError(Status.FULL, f"{MAX_REGIONS} shared memory regions are registered; unregister some first")
        if offset < 0 or size <= 0:
            invalid(f"shared memory region {name!r}: offset is at least 0 and byte_size at least 1")
        descriptor = _open(key)
        try:
            _check_object(descriptor, key, offset + size)
        except BaseException:
            os.close(descriptor)
            raise
        self._regions[name] = Region(name, key, offset, size, descriptor)

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of them for no name; a name that isn't registered is no mistake (as in Triton)."""
        self._check_allowed()
        for known in [name] if name else list(self._regions):
            region = self._regions.pop(known, None)
            if region is not None:
                os.close(region.descriptor)

    def status(self, name: str = "") -> list[Region]:
        """One region, or all of them for no name.

        Raises:
            ServeError: NOT_FOUND.
        """
        if not name:
            return list(self._regions.values())
        return [self._region(name)]

    def read(self, place: Place) -> memoryview:
        """The bytes there, copied once.

        Raises:
            ServeError: NOT_FOUND, no such region; INVALID, outside it, or the memory object has shrunk.
        """
        region = self._bounds(place)
        data = np.empty(place.size, np.uint8).data
        if os.preadv(region.descriptor, [data], region.offset + place.offset) != place.size:
            invalid(f"the memory object of region {region.name!r} is smaller than when it was registered")
        return data

    def check(self, place: Place) -> None:
        """Find mistakes of an output's place before the model runs.

        Raises:
            ServeError: NOT_FOUND or INVALID.
        """
        self._bounds(place)

    def write(self, place: Place, output: str, data: bytes | memoryview) -> None:
        """Put an output there.

        Raises:
            ServeError: NOT_FOUND, no such region; INVALID, it doesn't fit.
        """
        region = self._bounds(place)
        if len(data) > place.size:
            invalid(f"output {output!r} has {len(data)} bytes, its place in shared memory {place.size}")
        at = region.offset + place.offset
        _check_object(region.descriptor, region.key, at + len(data))  # else a write would make the object grow
        if os.pwrite(region.descriptor, data, at) != len(data):
            invalid(f"output {output!r} could not be written whole to shared memory region {region.name!r}")

    def close(self) -> None:
        """Forget all regions."""
        for region in self._regions.values():
            os.close(region.descriptor)
        self._regions.clear()

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise ServeError(Status.FORBIDDEN, "shared memory is off; start the server with --allow-shared-memory")

    def _region(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise ServeError(Status.NOT_FOUND, f"no shared memory region {name!r} is registered")
        return region

    def _bounds(self, place: Place) -> Region:
        region = self._region(place.region)
        if place.offset < 0 or place.size < 0 or place.offset + place.size > region.size:
            invalid(
                f"{place.size} bytes at {place.offset} lie outside shared memory region {region.name!r} "
                f"of {region.size} bytes"
            )
        return region


def _open(key: str) -> int:
    """The memory object's descriptor; a key is a name within the shared memory folder, no path."""
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in {".", ".."} or len(name) > _MAX_KEY:
        invalid(f"{key!r:.80} is no name of a shared memory object")
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(FOLDER / name, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        invalid(f"shared memory object {key!r} can't be opened: {reason}")


def _check_object(descriptor: int, key: str, end: int) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        invalid(f"{key!r} is no shared memory object")
    if end > found.st_size:
        invalid(f"shared memory object {key!r} has {found.st_size} bytes, {end} are needed")
