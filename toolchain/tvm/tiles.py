"""Register tiles by arithmetic: how many accumulators of which shape a loop nest keeps in vector registers.

The inner loop of a product reads ``vectors`` vectors of weights and ``rows`` single values of data and updates
``rows x vectors`` accumulators, one fused multiply-add each.  A core that starts two such instructions and two
loads a cycle, with a latency of four cycles, spends per step of the reduction

    max(rows * vectors, rows + vectors, 8) / 2   cycles

on a tile: the arithmetic, the loads, or the chains of dependent additions, whichever takes longest.  Where the
weights of a tile over the whole reduction don't fit in half of the level-1 cache, each of their vectors comes
from level 2 and counts as :data:`_FAR` loads.  The rule takes the tile with the least cost over the whole output,
counting the work wasted on ragged edges, among those whose accumulators and operands fit in the registers.  (The
model is the usual one of register blocking; see Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008, section 6, and Low et al., "Analytical Modeling Is Enough for High-Performance BLIS", 2016.)
"""

from __future__ import annotations

from dataclasses import dataclass

_IN_FLIGHT = 8
"""Independent additions that hide the latency of one: 4 cycles, two a cycle."""

_FAR = 4
"""Loads from level 1 that take as long as one of a 64-byte vector from level 2, at 32 bytes a cycle."""

MAX_ROWS = 14
"""Most rows: beyond it their addresses no longer fit in general registers."""

MAX_VECTORS = 8
"""Most vectors."""

NEON_SCRATCH = 6
"""Registers beside those of a tile for 8-bit products in several steps: a second value of data, sums in 16 bits."""

_SAMPLE_ROWS = (1, 4, 16, 64, 256)
"""Numbers of rows over which a tile is judged whose number is known only at run time."""


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` single values times ``vectors`` vectors."""

    rows: int
    vectors: int


@dataclass(frozen=True, slots=True)
class Room:
    """What a tile has to fit in.

    Attributes:
        registers: vector registers of the machine.
        l1_bytes: level-1 data cache of a core.
        panel_bytes: weights of one vector of outputs over the whole reduction.
        operands: vectors of weights that a step loads for one vector of outputs: two for an instruction on matrices.
        scratch: registers for what is on the way into the accumulators.
    """

    registers: int
    l1_bytes: int = 32768
    panel_bytes: int = 0
    operands: int = 1
    scratch: int = 0

    def holds(self, rows: int, vectors: int) -> bool:
        """Whether accumulators, the weights for each column of them, and one single value fit in the registers."""
        return rows * vectors + self.operands * vectors + 1 + self.scratch <= self.registers

    def step(self, rows: int, vectors: int) -> float:
        """Half cycles of one step of the reduction; of equal ones the one with fewer loads counts a little less."""
        far = self.panel_bytes * vectors > self.l1_bytes // 2
        loads = rows + self.operands * vectors * (_FAR if far else 1)
        return max(rows * vectors, loads, _IN_FLIGHT) + 0.01 * loads


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def cost(tile: Tile, rows: int, vectors: int, room: Room) -> float:
    """Half cycles per step of the reduction for an output of ``rows`` values times ``vectors`` vectors."""
    tiles = ceil_div(rows, tile.rows) * ceil_div(vectors, tile.vectors)
    return tiles * room.step(tile.rows, tile.vectors)


def choose_tile(rows: int | None, vectors: int, room: Room, multiple: int = 1) -> Tile:
    """The cheapest tile for ``rows`` (None: known only at run time) values times ``vectors`` vectors.

    Its rows are a multiple of ``multiple``, maybe more than there are.
    """
    most = min(ceil_div(rows or MAX_ROWS, multiple) * multiple, MAX_ROWS)
    fitting = [
        Tile(r, v)
        for r in range(multiple, most + 1, multiple)
        for v in range(1, min(vectors, MAX_VECTORS) + 1)
        if room.holds(r, v)
    ]
    if rows is not None:
        return min(fitting, key=lambda t: (cost(t, rows, vectors, room), -t.rows))
    least = {n: min(cost(t, n, vectors, room) for t in fitting) for n in _SAMPLE_ROWS}
    return min(fitting, key=lambda t: (sum(cost(t, n, vectors, room) / least[n] for n in _SAMPLE_ROWS), -t.rows))


def choose_rows(height: int, width: int, vectors: int, room: Room, multiple: int = 1) -> tuple[int, Tile]:
    """A tile of a two-dimensional output: how many image rows, and columns x vectors.

    With narrow images several image rows are taken at once, as long as they divide the height.  Columns are a
    multiple of ``multiple``, maybe more than there are.
    """
    best: tuple[float, int, Tile] | None = None
    for image_rows in (d for d in range(1, min(height, MAX_ROWS) + 1) if height % d == 0):
        most = min(ceil_div(width, multiple) * multiple, MAX_ROWS // image_rows)
        for columns in range(multiple, most + 1, multiple):
            for v in range(1, min(vectors, MAX_VECTORS) + 1):
                if not room.holds(image_rows * columns, v):
                    continue
                tiles = (height // image_rows) * ceil_div(width, columns) * ceil_div(vectors, v)
                spent = tiles * room.step(image_rows * columns, v)
                if best is None or spent < best[0]:
                    best = (spent, image_rows, Tile(columns, v))
    assert best is not None
    return best[1], best[2]
