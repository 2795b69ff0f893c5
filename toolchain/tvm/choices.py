"""Which tile, and which way, a loop nest takes: a record of tuning if there is one, else the rule's arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.tvm.loops import winograd
from toolchain.tvm.loops.conv import choose_conv_tile
from toolchain.tvm.nests import Choice, Nest
from toolchain.tvm.tiles import Room, ceil_div, choose_tile, cost

if TYPE_CHECKING:
    from toolchain.tvm.machine import Machine


@dataclass(slots=True)
class Asked:
    """A loop nest that a compilation met.

    Attributes:
        choice: what it was given.
        shape: sizes of its data as the graph has them, symbolic ones included.
        count: how often it occurs.
    """

    choice: Choice
    shape: Sequence[Any]
    count: int = 0


@dataclass(slots=True)
class Choices:
    """Answers graph passes, and keeps what it was asked.

    Attributes:
        records: loop nests that were tuned.
        asked: loop nests that were met, in order.
    """

    records: Mapping[Nest, Choice] = field(default_factory=dict)
    asked: dict[Nest, Asked] = field(default_factory=dict)

    def choose(self, nest: Nest, shape: Sequence[Any], machine: Machine) -> Choice:
        """The record's choice, or the rule's."""
        choice = self.records.get(nest)
        if choice is None:
            choice = by_rule(nest, machine)
        self.asked.setdefault(nest, Asked(choice, shape)).count += 1
        return choice

    @property
    def used(self) -> int:
        """How many records served."""
        return sum(nest in self.records for nest in self.asked)


def by_rule(nest: Nest, machine: Machine) -> Choice:
    """The choice without any record."""
    if nest.conv is None:
        tile = choose_tile(nest.data[0], nest.vectors, room_of(nest, machine))
        return Choice(1, tile.rows, tile.vectors)
    if nest.winograd_possible and winograd.pays(nest.conv, nest.weights, nest.output, machine):
        return winograd_by_rule(nest, machine)
    return direct_by_rule(nest, machine)


def direct_by_rule(nest: Nest, machine: Machine) -> Choice:
    """The tile of a direct convolution."""
    assert nest.conv is not None
    rows, tile = choose_conv_tile(nest.conv, nest.output, nest.vectors, room_of(nest, machine))
    return Choice(rows, tile.rows, tile.vectors)


def winograd_by_rule(nest: Nest, machine: Machine) -> Choice:
    """The tile of Winograd's products."""
    tile = choose_tile(_winograd_rows(nest), nest.vectors, room_of(nest, machine, winograd_products=True))
    return Choice(1, tile.rows, tile.vectors, winograd=True)


def room_of(nest: Nest, machine: Machine, *, winograd_products: bool = False) -> Room:
    """What its tiles have to fit in."""
    depth = nest.weights[1] if winograd_products else nest.depth
    return machine.room(depth, nest.dtype)


def candidates(nest: Nest, machine: Machine, count: int) -> list[Choice]:
    """Choices worth a measurement beside the rule's: the cheapest by the model, a third of them by the other way."""
    rule = by_rule(nest, machine)

    def best(way: bool, most: int) -> list[Choice]:
        fitting = [choice for choice in nest.choices(winograd=way) if choice != rule]
        return sorted(fitting, key=lambda c: (_cost(nest, c, machine), str(c)))[:most]

    if not nest.winograd_possible:
        return best(False, count)
    other = best(not rule.winograd, count // 3)
    # First the question that may matter most: the other way.
    return other[:1] + best(rule.winograd, count - len(other)) + other[1:]


def _cost(nest: Nest, choice: Choice, machine: Machine) -> float:
    room = room_of(nest, machine, winograd_products=choice.winograd)
    if choice.winograd:
        return cost(choice.tile, _winograd_rows(nest) or 256, nest.vectors, room)
    height, width = nest.output
    # Rows known only at run time: a sequence, mostly.
    tiles = ceil_div(height or 32, choice.rows) * ceil_div(width or 32, choice.columns)
    return tiles * ceil_div(nest.vectors, choice.vectors) * room.step(choice.rows * choice.columns, choice.vectors)


def _winograd_rows(nest: Nest) -> int | None:
    images, (height, width) = nest.data[0], nest.output
    if height is None or width is None:
        return None
    # A batch known only at run time counts as one image: more of them only add whole rows of tiles.
    return (images or 1) * ceil_div(height, winograd.OUT) * ceil_div(width, winograd.OUT)


def share_of(nest: Nest, machine: Machine, data: Sequence[int]) -> float:
    """Half cycles that the rule's choice is expected to take on ``data`` of these sizes, to compare loop nests by."""
    known = dataclasses.replace(nest, data=tuple(data))
    choice = by_rule(nest, machine)
    if choice.winograd:
        points = winograd.POINTS**2
        return _cost(known, choice, machine) * known.weights[1] * points
    images = data[0] if nest.conv is not None else 1
    groups = nest.conv.groups if nest.conv is not None else 1
    return _cost(known, choice, machine) * nest.depth * images * groups
