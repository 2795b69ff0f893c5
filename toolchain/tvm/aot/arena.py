"""Places of buffers in one block of memory, so that those that live at once do not overlap."""

from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 64

Life = tuple[int, int]
"""First and last step, both inclusive."""
Placed = tuple[int, int, Life]
"""Offset, size and life of a buffer."""


def place(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets of buffers, and the size of the block.

    Greedy by size: the largest first, each at the lowest offset that is free during its life (Y. Pisarchyk and
    J. Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).  ``tc_place`` in engine.c is the
    same for sizes that are known only when the model runs.

    Args:
        sizes: in bytes.
        lives: first and last step of each, both inclusive.

    Returns:
        Offsets in bytes, multiples of 64; bytes in all.
    """
    offsets = [0] * len(sizes)
    placed: list[Placed] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        offsets[index] = _lowest(sizes[index], lives[index], placed)
        placed.append((offsets[index], sizes[index], lives[index]))
    return offsets, max((_aligned(offset + size) for offset, size, _ in placed), default=0)


def place_guests(guests: Sequence[tuple[int, Life]], placed: Sequence[Placed], total: int) -> list[int | None]:
    """Offsets of further buffers in a block that has been planned, where they fit without making it larger.

    Args:
        guests: (size, life) of each.
        placed: what has its place.
        total: bytes of the block.

    Returns:
        An offset for each; None where there is no room for it.
    """
    taken = list(placed)
    offsets: list[int | None] = []
    for size, life in guests:
        offset = _lowest(size, life, taken)
        fits = offset + size <= total
        offsets.append(offset if fits else None)
        if fits:
            taken.append((offset, size, life))
    return offsets


def _lowest(size: int, life: Life, placed: Sequence[Placed]) -> int:
    """The lowest offset at which ``size`` bytes are free during ``life``."""
    offset = 0
    for other, taken, _ in sorted(p for p in placed if p[2][0] <= life[1] and life[0] <= p[2][1]):
        if offset + size <= other:
            break
        offset = max(offset, _aligned(other + taken))
    return offset


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
