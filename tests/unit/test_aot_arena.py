"""Places of buffers: none that live at once overlap, and the block is as small as can be expected."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from toolchain.tvm.aot.arena import ALIGNMENT, place, place_guests

LIVES = st.tuples(st.integers(0, 20), st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
BUFFERS = st.lists(st.tuples(st.integers(0, 5000), LIVES), max_size=25)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@given(BUFFERS)
def test_buffers_that_live_at_once_do_not_overlap(buffers: list[tuple[int, tuple[int, int]]]) -> None:
    sizes, lives = [b[0] for b in buffers], [b[1] for b in buffers]
    offsets, total = place(sizes, lives)
    for i, (a, life) in enumerate(zip(offsets, lives, strict=True)):
        assert a % ALIGNMENT == 0
        assert a + sizes[i] <= total
        for j in range(i):
            if life[0] <= lives[j][1] and lives[j][0] <= life[1]:
                assert a + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= a


@given(BUFFERS)
def test_the_block_holds_at_least_the_busiest_step_and_at_most_all(buffers: list[tuple[int, tuple[int, int]]]) -> None:
    sizes, lives = [b[0] for b in buffers], [b[1] for b in buffers]
    _, total = place(sizes, lives)
    busiest = max((sum(s for s, (a, b) in buffers if a <= t <= b) for t in range(30)), default=0)
    assert busiest <= total <= sum(aligned(s) for s in sizes)


def test_a_chain_needs_two_buffers() -> None:
    offsets, total = place([1024] * 10, [(i, i + 1) for i in range(10)])
    assert total == 2048
    assert set(offsets) == {0, 1024}


@given(BUFFERS, BUFFERS)
def test_guests_take_room_that_is_free_and_never_more(buffers: list[Any], guests: list[Any]) -> None:
    sizes, lives = [b[0] for b in buffers], [b[1] for b in buffers]
    offsets, total = place(sizes, lives)
    taken = list(zip(offsets, sizes, lives, strict=True))
    places = place_guests(guests, taken, total)
    assert len(places) == len(guests)
    for at, (size, life) in zip(places, guests, strict=True):
        if at is None:
            continue
        assert at % ALIGNMENT == 0
        assert at + size <= total
        for other, length, during in taken:
            if life[0] <= during[1] and during[0] <= life[1]:
                assert at + size <= other or other + length <= at
        taken.append((at, size, life))


def test_a_guest_that_fits_gets_a_place() -> None:
    assert place_guests([(512, (0, 0)), (1024, (0, 1)), (64, (0, 0))], [(0, 512, (0, 0)), (0, 1024, (1, 1))], 1024) == [
        512, None, None,
    ]  # fmt: skip
