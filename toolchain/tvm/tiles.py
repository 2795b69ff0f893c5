"""Register tiles by arithmetic: how many accumulators of which shape a loop nest keeps in vector registers.

The inner loop of a product reads ``vectors`` vectors of weights and ``rows`` single values of data and updates
``rows x vectors`` accumulators (one fused multiply-add each).  A core that starts two such instructions and two
loads a cycle, with a latency of four cycles, spends per step of the reduction

    max(rows * vectors, rows + vectors, 8) / 2   cycles

on a tile: the arithmetic, the loads, or the chains of dependent additions, whichever takes longest.  The rule
takes the tile with the least cost over the whole output, counting the work wasted on ragged edges, among those
whose accumulators and operands fit in the registers.  (The model is the usual one of register blocking; see
Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, section 6, and Low et al.,
"Analytical Modeling Is Enough for High-Performance BLIS", 2016.)
"""

from __future__ import annotations

from dataclasses import dataclass

_IN_FLIGHT = 8
"""Independent additions that hide the latency of one: 4 cycles, two a cycle."""

_MAX_ROWS = 14
"""Most rows: beyond it their addresses no longer fit in general registers."""

_MAX_VECTORS = 8

_DYNAMIC_ROWS = 4
"""Rows of a tile when their number is known only at run time: little is wasted on one row, 4x6 is still well fed."""


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` single values times ``vectors`` vectors."""

    rows: int
    vectors: int


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def cost(tile: Tile, rows: int, vectors: int) -> float:
    """Half cycles per step of the reduction for an output of ``rows`` values times ``vectors`` vectors."""
    tiles = ceil_div(rows, tile.rows) * ceil_div(vectors, tile.vectors)
    return tiles * max(tile.rows * tile.vectors, tile.rows + tile.vectors, _IN_FLIGHT)


def choose_tile(rows: int | None, vectors: int, registers: int) -> Tile:
    """The cheapest tile.

    Args:
        rows: how many single values the output spans; None when known only at run time.
        vectors: how many vectors it spans.
        registers: vector registers of the machine.
    """
    # One register holds the single value: it is multiplied several times.
    usable = registers - 1
    most_rows = min(rows or _DYNAMIC_ROWS, _MAX_ROWS)
    fitting = [
        Tile(r, v)
        for r in range(1, most_rows + 1)
        for v in range(1, min(vectors, _MAX_VECTORS) + 1)
        if r * v + v <= usable
    ]
    if rows is None:
        return max(fitting, key=lambda t: (t.rows * t.vectors / (t.rows + t.vectors), -cost(t, 64, vectors), t.rows))
    # Of equal costs the one with fewer loads per multiplication, then the wider one: fewer tiles to start.
    return min(fitting, key=lambda t: (cost(t, rows, vectors), (t.rows + t.vectors) / (t.rows * t.vectors), -t.rows))


def choose_rows(height: int, width: int, vectors: int, registers: int) -> tuple[int, Tile]:
    """A tile of a two-dimensional output: how many image rows, and columns x vectors.

    A tile never spans a fraction of an image row more than once: with narrow images several whole rows are
    taken, as long as they divide the height.
    """
    best: tuple[float, int, Tile] | None = None
    usable = registers - 1
    for image_rows in (d for d in range(1, min(height, _MAX_ROWS) + 1) if height % d == 0):
        for columns in range(1, min(width, _MAX_ROWS // image_rows) + 1):
            for v in range(1, min(vectors, _MAX_VECTORS) + 1):
                flat = Tile(image_rows * columns, v)
                if flat.rows * v + v > usable:
                    continue
                total = (height // image_rows) * ceil_div(width, columns) * ceil_div(vectors, v)
                spent = total * max(flat.rows * v, flat.rows + v, _IN_FLIGHT)
                key = spent + (flat.rows + v) / (flat.rows * v) + 1e-3 * image_rows
                if best is None or key < best[0]:
                    best = (key, image_rows, Tile(columns, v))
    assert best is not None
    return best[1], best[2]
