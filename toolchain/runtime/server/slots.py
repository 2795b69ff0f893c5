"""Shared memory between the server and one worker, and the small messages that say what lies in it.

Each slot is an anonymous memory file mapped by both processes: the server writes the inputs of one run into it, the
worker overwrites them with the outputs.  Both know the contract, so a message holds sizes only.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
_CACHED_LAYOUTS = 64
_LARGE = 4 << 20

Shapes = tuple[tuple[int, ...], ...]


class Kind:
    """What a message is about."""

    RUN = 1
    DONE = 2
    FAILED = 3
    READY = 4
    REFUSED = 5


#: kind, slot, nanoseconds in the engine; then the sizes as int64, or UTF-8 text.
HEADER = struct.Struct("<HHIq")
#: The longest message: sizes of a few thousand axes, or an error's text.
MESSAGE_BYTES = 1 << 16


class TensorLayout:
    """How tensors of fixed dtypes and ranks lie in a slot one after the other, each at a multiple of 64 bytes.

    Args:
        tensors: dtype name and rank of each.
    """

    def __init__(self, tensors: Sequence[tuple[str, int]]) -> None:
        self.dtypes = [np.dtype(name) for name, _ in tensors]
        self._ranks = [rank for _, rank in tensors]
        self._struct = struct.Struct(f"<{sum(self._ranks)}q")

    def pack(self, kind: int, slot: int, nanoseconds: int, shapes: Shapes) -> bytes:
        return HEADER.pack(kind, slot, 0, nanoseconds) + self._struct.pack(*(n for shape in shapes for n in shape))

    def unpack(self, body: bytes) -> Shapes:
        sizes = self._struct.unpack(body)
        shapes, start = [], 0
        for rank in self._ranks:
            shapes.append(sizes[start : start + rank])
            start += rank
        return tuple(shapes)

    def nbytes(self, shapes: Shapes) -> int:
        """Bytes that tensors of these shapes take in a slot."""
        total = 0
        for dtype, shape in zip(self.dtypes, shapes, strict=True):
            total += _aligned(math.prod(shape) * dtype.itemsize)
        return total


class Slot:
    """One mapped memory file, which grows when a larger run comes; what lies unused is given back to the system."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory: mmap.mmap | None = None
        self._views: dict[tuple[int, Shapes], list[np.ndarray]] = {}
        #: Changes when earlier views are no longer of the memory in use.
        self.generation = 0
        self._used = False

    @classmethod
    def create(cls) -> Slot:
        return cls(os.memfd_create("toolchain-slot"))

    def views(self, layout: TensorLayout, shapes: Shapes, limit: int = 0) -> list[np.ndarray]:
        """Arrays over the slot's memory, which the next run overwrites.

        Raises:
            ValueError: they take more bytes than ``limit``, if that is not 0.
        """
        self._used = True
        key = (id(layout), shapes)  # a layout outlives its slots
        views = self._views.get(key)
        if views is None:
            views = self._map(layout, shapes, limit)
            if len(self._views) >= _CACHED_LAYOUTS:
                self._views.clear()
            self._views[key] = views
        return views

    def _map(self, layout: TensorLayout, shapes: Shapes, limit: int) -> list[np.ndarray]:
        needed = max(layout.nbytes(shapes), 1)
        if limit and needed > limit:
            raise ValueError(f"the tensors of this run take {needed} bytes, allowed are {limit}")
        if self._memory is None or len(self._memory) < needed:
            if os.fstat(self.fd).st_size < needed:
                os.ftruncate(self.fd, -(-needed // _PAGE) * _PAGE)
            # The old mapping goes when the last view of it does.
            self._views.clear()
            self.generation += 1
            self._memory = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        views, offset = [], 0
        for dtype, shape in zip(layout.dtypes, shapes, strict=True):
            views.append(np.ndarray(shape, dtype, self._memory, offset))
            offset += _aligned(views[-1].nbytes)
        return views

    def trim(self) -> None:
        """Give large memory back if nothing was put into it since the last call; call it for a free slot only."""
        if not self._used and self._memory is not None and len(self._memory) > _LARGE:
            # The pages go, the mapping stays: what is read before it is written again is zero.
            self._memory.madvise(mmap.MADV_REMOVE)
        self._used = False

    def close(self) -> None:
        self._views.clear()
        self._memory = None
        os.close(self.fd)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
