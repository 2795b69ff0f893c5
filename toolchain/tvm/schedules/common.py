"""What schedule rules share."""

from __future__ import annotations

import math
from typing import Any

from toolchain.tvm.library import load_tvm
from toolchain.tvm.machine import Machine, dtype_bits

PARALLEL_MIN = 1 << 15
"""Least work worth waking other threads for, in elements: a launch costs some microseconds, and more on a busy core."""

_MACS_PER_ELEMENT = 32
"""Multiply-adds of a tiled product that take about as long as one element of a loop over memory."""

_SIZE_AT_RUN_TIME = 4
"""What a size counts as that is known only at run time."""

_LONG = 60
"""Nodes of an expression beyond which a tile's epilogue becomes a loop: more than sums, bounds and a residual."""


class DoesNotFitError(Exception):
    """A rule doesn't fit this loop nest."""


def blocks_of(schedule: Any) -> list[Any]:
    """All blocks, in order."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def name_of(schedule: Any, block: Any) -> str:
    """A block's name."""
    return str(schedule.get(block).name_hint)


def mark_of(schedule: Any, block: Any, key: str) -> Any:
    """The annotation ``key`` of a block, or None."""
    annotations = schedule.get(block).annotations
    return annotations.get(key, None)


def extent(schedule: Any, loop: Any) -> int:
    """A loop's extent; 0 when it is known only at run time."""
    size = schedule.get(loop).extent
    return int(size) if isinstance(size, int) or hasattr(size, "value") else 0


def kinds(schedule: Any, block: Any) -> list[int]:
    """Kinds of the block's iteration variables: 0 spatial, 2 reduction."""
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def is_reduction(schedule: Any, block: Any) -> bool:
    """Whether the block reduces."""
    return 2 in kinds(schedule, block)


def lanes_of(schedule: Any, block: Any, machine: Machine) -> int:
    """Elements of the block's output in a vector register."""
    return max(1, machine.vector_bits // dtype_bits(str(schedule.get(block).writes[0].source.ty.dtype)))


def divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return max(d for d in range(1, max(1, min(number, limit)) + 1) if number % d == 0)


def parallel(schedule: Any, loops: list[Any], work: int) -> None:
    """Fuses ``loops`` and runs them in parallel if ``work``, in elements, is worth it."""
    if loops and work >= PARALLEL_MIN:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def work_of(schedule: Any, loops: list[Any], at_run_time: int = _SIZE_AT_RUN_TIME) -> int:
    """Iterations of the nest, sizes known only at run time counted as ``at_run_time``."""
    return math.prod(extent(schedule, loop) or at_run_time for loop in loops)


def products_of(schedule: Any, anchor: Any, at_run_time: int = 1) -> int:
    """Work of a tiled product, not yet split, for :func:`parallel`.

    A batch of images counts as one: small models mostly run on one.
    """
    return work_of(schedule, schedule.get_loops(anchor), at_run_time) // _MACS_PER_ELEMENT


def split_epilogue(schedule: Any, anchor: Any) -> Any:
    """Puts the result of ``anchor`` into registers and everything after it into one block, which is returned."""
    blocks = blocks_of(schedule)
    index = [name_of(schedule, b) for b in blocks].index(name_of(schedule, anchor))
    for block in blocks[:index]:
        if not name_of(schedule, block).startswith("pad"):
            schedule.compute_inline(block)
    after = blocks[index + 1 :]
    if any(is_reduction(schedule, block) for block in after):
        raise DoesNotFitError
    if not after:
        return schedule.cache_write(anchor, 0, "local")
    for block in after[:-1]:
        schedule.compute_inline(block)
    schedule.set_scope(anchor, 0, "local")
    return after[-1]


def is_heavy(schedule: Any, block: Any) -> bool:
    """Whether what ``block`` computes is too long to be written out once for each accumulator of a tile."""
    import tvm_ffi
    from tvm import ir

    count = 0

    def visit(_node: Any) -> None:
        nonlocal count
        count += 1

    tvm_ffi.structural_walk(schedule.get(block).body, (ir.Expr, visit))
    return count > _LONG


def settle(schedule: Any, anchor: Any, final: Any) -> Any:
    """Has the tile of ``anchor`` copied from registers to a small buffer, from which ``final`` reads it.

    Where the work behind a product is long, its loops over the tile then need not be unrolled: registers can't
    be indexed.  One store and one load an accumulator are little beside that work.  Returns the block that copies.
    """
    buffer = schedule.get(anchor).writes[0].source
    reads = [region.source for region in schedule.get(final).reads]
    index = next(i for i, source in enumerate(reads) if source.same_as(buffer))
    return schedule.cache_read(final, index, "local")


def spatial(schedule: Any, block: Any, machine: Machine) -> None:
    """A block without reduction: parallel outside, a vector inside where memory is walked in order."""
    loops = schedule.get_loops(block)
    work = work_of(schedule, loops)
    *outer, last = loops
    lanes = dividing_lanes(extent(schedule, last), lanes_of(schedule, block, machine))
    if lanes and walks_lanes(schedule, block, len(loops) - 1):
        last_outer, lane = schedule.split(last, [None, lanes])
        schedule.vectorize(lane)
        outer.append(last_outer)
    parallel(schedule, outer or [last], work)


def dividing_lanes(size: int, lanes: int) -> int:
    """The largest power of two from 4 up to ``lanes`` that divides ``size``; 0 if there is none."""
    while lanes >= 4:
        if size and size % lanes == 0:
            return lanes
        lanes //= 2
    return 0


def reduction(schedule: Any, block: Any, machine: Machine) -> None:
    """A reduction on its own: vectors over outputs where neighbours are neighbours in memory."""
    loops, of_kind = schedule.get_loops(block), kinds(schedule, block)
    work = work_of(schedule, loops)
    where = [i for i, kind in enumerate(of_kind) if kind == 0]
    reduces = [loop for loop, kind in zip(loops, of_kind, strict=True) if kind == 2]
    outer = [loops[i] for i in where]
    if where and walks_lanes(schedule, block, where[-1]):
        lanes = dividing_lanes(extent(schedule, outer[-1]), lanes_of(schedule, block, machine))
        if lanes:
            last_outer, lane = schedule.split(outer[-1], [None, lanes])
            outer[-1] = last_outer
            schedule.reorder(*outer, *reduces, lane)
            schedule.vectorize(lane)
            parallel(schedule, outer, work)
            schedule.decompose_reduction(block, reduces[0])
            return
    if outer:
        schedule.reorder(*outer, *reduces)
    parallel(schedule, outer, work)


def walks_lanes(schedule: Any, block: Any, index: int) -> bool:
    """Whether neighbouring values of iteration variable ``index`` are neighbours in all buffers it addresses.

    Otherwise a vector would be gathered element by element, and the loop is better left scalar.
    """
    body = schedule.get(block)
    lane = body.iter_vars[index].var
    for region in [*body.reads, *body.writes]:
        *rest, last = [axis.min for axis in region.region] or [None]
        if any(_mentions(axis, lane) for axis in rest):
            return False
        if last is None or not _mentions(last, lane):
            continue
        if not _advances_by_one(last, lane):
            return False
    return True


def _mentions(expression: Any, variable: Any) -> bool:
    from tvm import tirx

    return any(found.same_as(variable) for found in tirx.analysis.undefined_vars(expression, []))


def _advances_by_one(expression: Any, variable: Any) -> bool:
    tvm = load_tvm()
    coefficients = tvm.sym.detect_linear_equation(expression, [variable])
    if not coefficients:
        return False
    slope = tvm.sym.Analyzer().simplify(coefficients[0])
    return isinstance(slope, tvm.tirx.IntImm) and int(slope.value) == 1
