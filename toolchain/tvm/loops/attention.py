"""Attention as one loop nest: softmax(q k^T * scale + mask) v for a block of query rows of one head at a time.

The keys of a head are packed once, transposed and filled up with zeros to whole vectors; a block's scores stay in
a buffer of rows times keys, never in memory as a whole.  The division by the sum of exponentials is done on the
result, which is smaller than the scores.  Values are read where they lie, and the result is written with the heads
of a position side by side, (b, s, h, d), so that nothing around it is transposed.  (Not the streaming form of
FlashAttention: a block's scores fit in the level-1 or level-2 cache, and each is exponentiated only once.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolchain.tvm.loops import COLUMNS, ROWS, RULE, VECTORS
from toolchain.tvm.loops.rows import STAGE, Space, exp_negative, per_row, reduce
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import ceil_div, choose_tile

Axes = tuple[str | int, ...]
"""What the axes of a tensor are: ``"b"``, ``"h"``, ``"s"``, ``"d"``, or a number: that place of an axis."""

_MANY = 64
"""Queries assumed where their number is known only at run time."""

DOT_ROWS = 2
"""Up to so many query rows packing the keys costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Batch, heads, queries, keys and elements of a head; all but the last may be symbolic."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any
    depth: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles.

    Attributes:
        lanes: elements of a vector.
        rows: query rows of a block.
        score_vectors: vectors of keys of a tile of scores.
        vectors: vectors of a tile of the result.
        packed: whether keys are packed.
    """

    lanes: int
    rows: int
    score_vectors: int
    vectors: int
    packed: bool


def plan(sizes: Sizes, machine: Machine) -> Plan:
    """Tiles by the machine's registers: the rows that suit the second product, and vectors of keys to match."""
    lanes = machine.lanes("float32")
    known = sizes.queries if isinstance(sizes.queries, int) else None
    room = machine.room(sizes.depth, "float32")
    vectors = ceil_div(sizes.depth, lanes)
    tile = choose_tile(known or _MANY, vectors, room)
    best = max(v for v in range(1, vectors + 1) if vectors % v == 0 and v <= tile.vectors)
    packed = known is None or known > DOT_ROWS or sizes.depth % lanes != 0
    fitting = [v for v in range(1, 5) if room.holds(tile.rows, v)]
    score = max(v for v in fitting if v in (1, 2, 4))
    if isinstance(sizes.keys, int):
        chunks = ceil_div(sizes.keys, lanes)
        score = min(fitting, key=lambda v: (ceil_div(chunks, v) * max(room.step(tile.rows, v), 1), -v))
    return Plan(lanes, tile.rows, score if packed else 1, best, packed)


def read(tensor: Any, axes: Axes, at: tuple[Any, Any, Any, Any]) -> Any:
    """Element (b, h, s, d) of queries, keys or values."""
    named = dict(zip("bhsd", at, strict=True))
    return tensor[tuple(axis if isinstance(axis, int) else named[axis] for axis in axes)]


def _sizes(query: Any, keys: Any, orders: tuple[Axes, Axes, Axes]) -> Sizes:
    """Sizes in terms of the operands' own variables."""

    def axis(tensor: Any, order: Axes, name: str) -> Any:
        size = tensor.shape[order.index(name)]
        return int(size) if hasattr(size, "value") else size

    b, h, s, d = (axis(query, orders[0], name) for name in "bhsd")
    return Sizes(b, h, s, axis(keys, orders[1], "s"), d)


def attention(operands: tuple[Any, ...], orders: tuple[Axes, Axes, Axes], scale: float, made: Plan) -> Any:
    """The loop nest; ``operands``: queries, keys, values and, maybe, a mask that broadcasts to (b, h, s, t)."""
    from tvm import te

    query, keys, values, *masks = operands
    sizes = _sizes(query, keys, orders)
    width = made.lanes * made.score_vectors
    tiles = (sizes.keys - 1) // width + 1
    space = Space(
        (sizes.batch, sizes.heads), sizes.queries, sizes.keys, made.lanes, made.rows,
        tiles * made.score_vectors, made.score_vectors,
    )  # fmt: skip

    def position(tile: Any, row: Any) -> Any:
        s = tile * made.rows + row
        covered = isinstance(sizes.queries, int) and sizes.queries % made.rows == 0
        return s if covered else te.min(s, sizes.queries - 1)

    def asked(b: Any, h: Any, tile: Any, row: Any, d: Any) -> Any:
        return read(query, orders[0], (b, h, position(tile, row), d))

    products = _packed_products if made.packed else _dot_products
    acc = products(asked, keys, orders[1], sizes, made, space, tiles)
    mask = _mask(masks[0], sizes, made, space, tiles, position) if masks else None
    shape = (*space.rows, tiles, width)
    scores = _scores(acc, mask, scale, sizes, shape)

    def chunk(tensor: Any, row: Any, c: Any, v: Any) -> Any:
        return tensor[(*row, c // made.score_vectors, c % made.score_vectors * made.lanes + v)]

    greatest = reduce(space, lambda row, c, v: chunk(scores, row, c, v), "max", "greatest")
    powers = te.compute(
        shape, lambda *at: exp_negative(scores[at] - greatest[at[:-2]]), name="powers", attrs={STAGE: "powers"}
    )
    total = reduce(space, lambda row, c, v: chunk(powers, row, c, v), "sum", "total")
    share = per_row(space, lambda row: 1.0 / total[row], "share")
    return _result(powers, share, values, orders[2], sizes, made, space)


def _scores(acc: Any, mask: Any, scale: float, sizes: Sizes, shape: tuple[Any, ...]) -> Any:
    """Products times ``scale`` plus the mask; minus infinity beyond the last key."""
    from tvm import te, tirx

    width = shape[-1]
    ragged = not (isinstance(sizes.keys, int) and sizes.keys % width == 0)

    def score(*at: Any) -> Any:
        value = acc(*at) * tirx.const(scale, "float32")
        if mask is not None:
            return value + mask(*at)
        if not ragged:
            return value
        inside = at[-2] * width + at[-1] < sizes.keys
        return tirx.Select(inside, value, tirx.const(float("-inf"), "float32"))

    return te.compute(shape, score, name="scores", attrs={STAGE: "scores"})


def _packed_products(asked: Any, keys: Any, order: Axes, sizes: Sizes, made: Plan, space: Space, tiles: Any) -> Any:
    """Products of queries and keys, by (b, h, tile, row, tile of keys, place)."""
    from tvm import te, tirx

    width = made.lanes * made.score_vectors

    def pack(b: Any, h: Any, t: Any, d: Any, w: Any) -> Any:
        place = t * width + w
        if isinstance(sizes.keys, int) and sizes.keys % width == 0:
            return read(keys, order, (b, h, place, d))
        element = read(keys, order, (b, h, place, d))
        return tirx.if_then_else(place < sizes.keys, element, tirx.const(0.0, "float32"))

    d = te.reduce_axis((0, sizes.depth), "d")
    packed = te.compute(
        (sizes.batch, sizes.heads, tiles, sizes.depth, width), pack, name="packed_keys", attrs={STAGE: "pack"}
    )
    acc = te.compute(
        (*space.rows, tiles, width),
        lambda b, h, i, r, t, w: te.sum(asked(b, h, i, r, d) * packed[b, h, t, d, w], axis=d),
        name="products",
        attrs={STAGE: "products"},
    )
    return lambda *at: acc[at]


def _dot_products(asked: Any, keys: Any, order: Axes, sizes: Sizes, made: Plan, space: Space, tiles: Any) -> Any:
    """The same without packing: a sum for each lane over a key's elements, then those added up by halves."""
    from tvm import te

    step = te.reduce_axis((0, sizes.depth // made.lanes), "d")

    def partial(*at: Any) -> Any:
        b, h, i, r, t, w, lane = at
        place = te.min(t * made.lanes * made.score_vectors + w, sizes.keys - 1)
        d = step * made.lanes + lane
        return te.sum(asked(b, h, i, r, d) * read(keys, order, (b, h, place, d)), axis=step)

    shape = (*space.rows, tiles, made.lanes * made.score_vectors)
    result = te.compute((*shape, made.lanes), partial, name="dots", attrs={STAGE: "dots"})
    width = made.lanes
    while width > 1:
        width //= 2
        result = _halves(result, shape, width)
    return lambda *at: result[(*at, 0)]


def _halves(whole: Any, shape: tuple[Any, ...], width: int) -> Any:
    from tvm import te

    return te.compute(
        (*shape, width),
        lambda *at: whole[at] + whole[(*at[:-1], at[-1] + width)],
        name=f"dots_{width}",
        attrs={STAGE: "halves"},
    )


def _mask(mask: Any, sizes: Sizes, made: Plan, space: Space, tiles: Any, position: Any) -> Any:
    """The mask by (b, h, tile, row, tile of keys, place), minus infinity beyond the last key."""
    from tvm import te, tirx

    width = made.lanes * made.score_vectors
    shape = [int(size) if hasattr(size, "value") else size for size in mask.shape]
    shape = [1] * (4 - len(shape)) + shape
    by_row = shape[2] != 1

    def element(b: Any, h: Any, s: Any, t: Any) -> Any:
        at = [0 if size == 1 else index for size, index in zip(shape, (b, h, s, t), strict=True)]
        return mask[tuple(at[4 - len(mask.shape) :])]

    def padded(b: Any, h: Any, i: Any, r: Any, t: Any, w: Any) -> Any:
        place = t * width + w
        value = element(b, h, position(i, r) if by_row else 0, place)
        if isinstance(sizes.keys, int) and sizes.keys % width == 0:
            return value
        return tirx.if_then_else(place < sizes.keys, value, tirx.const(float("-inf"), "float32"))

    rows = made.rows if by_row else 1
    loaded = te.compute((*space.rows[:-1], rows, tiles, width), padded, name="mask_load", attrs={STAGE: "mask"})
    return lambda b, h, i, r, t, w: loaded[b, h, i, r if by_row else 0, t, w]


def _result(powers: Any, share: Any, values: Any, order: Axes, sizes: Sizes, made: Plan, space: Space) -> Any:
    from tvm import te, tirx

    width = made.lanes * made.score_vectors
    vectors = ceil_div(sizes.depth, made.lanes)
    t = te.reduce_axis((0, sizes.keys), "t")

    def value(b: Any, h: Any, v: Any, lane: Any) -> Any:
        place = v * made.lanes + lane
        return read(values, order, (b, h, t, place))

    if sizes.depth % made.lanes:
        filled = te.compute(
            (sizes.batch, sizes.heads, sizes.keys, vectors, made.lanes),
            lambda b, h, s, v, lane: tirx.if_then_else(
                v * made.lanes + lane < sizes.depth,
                read(values, order, (b, h, s, v * made.lanes + lane)),
                tirx.const(0.0, "float32"),
            ),
            name="packed_values",
            attrs={STAGE: "pack"},
        )

        def value(b: Any, h: Any, v: Any, lane: Any) -> Any:
            return filled[b, h, t, v, lane]

    acc = te.compute(
        (*space.rows, vectors, made.lanes),
        lambda b, h, i, r, v, lane: te.sum(powers[b, h, i, r, t // width, t % width] * value(b, h, v, lane), axis=t),
        name="weighted",
        attrs={STAGE: "weighted", RULE: "attention_product", ROWS: 1, COLUMNS: made.rows, VECTORS: made.vectors},
    )

    def result(b: Any, s: Any, h: Any, d: Any) -> Any:
        row = (b, h, s // made.rows, s % made.rows)
        return acc[(*row, d // made.lanes, d % made.lanes)] * share[row]

    marks = {RULE: "attention", COLUMNS: made.rows}
    return te.compute((sizes.batch, sizes.queries, sizes.heads, sizes.depth), result, name="attended", attrs=marks)
