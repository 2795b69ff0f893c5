"""Tensors in shared memory, and the messages about them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from toolchain.runtime.server.slots import HEADER, Kind, Slot, TensorLayout

LAYOUT = TensorLayout([("float32", 2), ("int8", 1), ("bool", 0)])


@pytest.fixture
def slot() -> Iterator[Slot]:
    made = Slot.create()
    yield made
    made.close()


def other_side(slot: Slot) -> Slot:
    return Slot(os.dup(slot.fd))


def test_both_sides_see_the_same_tensors_each_at_a_multiple_of_64_bytes(slot: Slot) -> None:
    shapes = ((2, 3), (5,), ())
    mine = slot.views(LAYOUT, shapes)
    for index, view in enumerate(mine):
        view[...] = 3 - index
        assert view.ctypes.data % 64 == 0
    theirs = other_side(slot)
    for index, view in enumerate(theirs.views(LAYOUT, shapes)):
        assert (view == 3 - index).all()
        assert view.shape == shapes[index]
    theirs.close()


def test_sizes_survive_the_message() -> None:
    for shapes in [((2, 3), (5,), ()), ((0, 7), (0,), ())]:
        message = LAYOUT.pack(Kind.RUN, 1, 42, shapes)
        assert HEADER.unpack_from(message) == (Kind.RUN, 1, 0, 42)
        assert LAYOUT.unpack(message[HEADER.size :]) == shapes


def test_a_slot_grows_on_either_side_and_old_views_stay_valid(slot: Slot) -> None:
    small, large = ((1, 1), (1,), ()), ((1000, 1000), (1,), ())
    before = slot.views(LAYOUT, small)
    before[0][...] = 7
    theirs = other_side(slot)
    theirs.views(LAYOUT, large)[0][...] = 8
    assert before[0][0, 0] == 8
    assert (slot.views(LAYOUT, large)[0] == 8).all()
    assert slot.generation == 2
    theirs.close()


def test_more_than_the_limit_is_refused_before_it_is_allocated(slot: Slot) -> None:
    with pytest.raises(ValueError, match="allowed are 1000"):
        slot.views(LAYOUT, ((10**6, 10**6), (1,), ()), 1000)
    assert os.fstat(slot.fd).st_size == 0


def test_large_memory_that_lies_unused_is_given_back(slot: Slot) -> None:
    shapes = ((2000, 1000), (1,), ())
    slot.views(LAYOUT, shapes)[0][...] = 1
    held = os.fstat(slot.fd).st_blocks * 512
    assert held >= 8_000_000
    slot.trim()
    assert os.fstat(slot.fd).st_blocks * 512 == held
    slot.trim()
    assert os.fstat(slot.fd).st_blocks * 512 < mmap.PAGESIZE * 2
    slot.views(LAYOUT, shapes)[0][...] = 2
    theirs = other_side(slot)
    assert (theirs.views(LAYOUT, shapes)[0] == 2).all()
    theirs.close()
