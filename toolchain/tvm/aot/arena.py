"""Places of buffers in one block of memory, so that those that live at once do not overlap."""

from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 64


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
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        first, last = lives[index]
        others = [i for i in placed if lives[i][0] <= last and first <= lives[i][1]]
        offset = 0
        for other in sorted(others, key=lambda i: offsets[i]):
            if offset + sizes[index] <= offsets[other]:
                break
            offset = max(offset, _aligned(offsets[other] + sizes[other]))
        offsets[index] = offset
        placed.append(index)
        total = max(total, _aligned(offset + sizes[index]))
    return offsets, total


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
