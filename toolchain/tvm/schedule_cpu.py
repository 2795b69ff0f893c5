"""Generic CPU schedules by fixed rules: no tuning, so the same module always gives the same code.

Three rules: the packed convolution (see :mod:`toolchain.tvm.legalize_cpu`) and the matrix product keep a tile of
accumulators in vector registers over the whole reduction; everything else gets its outermost loops in parallel
and its innermost spatial loop vectorized where it walks memory contiguously.  A rule that doesn't fit a loop
nest leaves it to the generic one; a loop nest that not even that fits stays naive and is noted by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.tvm.library import load_tvm

if TYPE_CHECKING:
    from toolchain.tvm.pipeline import Notes

_PARALLEL_MIN = 1 << 14
"""Fewest iterations worth waking other threads for: a launch costs some microseconds."""

_RESERVED = 4
"""Vector registers kept free of accumulators, for operands."""


class _DoesNotFitError(Exception):
    """A rule doesn't fit this loop nest."""


def schedule_pass(vector_bits: int, registers: int, notes: Notes) -> Any:
    """A module pass that schedules every loop nest and adds the names of those it could not to ``notes``."""
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="toolchain.schedule_cpu")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        scheduled = {}
        for variable, function in module.functions_items():
            if not isinstance(function, tvm.tirx.PrimFunc):
                continue
            body = schedule_function(function, vector_bits, registers)
            if body is None:
                notes.unscheduled.append(variable.name_hint)
            else:
                scheduled[variable] = body.with_attrs({**dict(function.attrs), "tirx.is_scheduled": True})
        notes.unscheduled.sort()
        module = module.clone()
        for variable, body in scheduled.items():
            module.update_func(variable, body)
        return module

    return apply


def schedule_function(function: Any, vector_bits: int, registers: int) -> Any:
    """``function`` scheduled, or None if no rule fits."""
    tvm = load_tvm()
    from tvm import s_tir

    for rule in (_packed_conv2d, _matmul, _generic):
        schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
        try:
            rule(schedule, vector_bits, registers)
        except (_DoesNotFitError, RuntimeError, ValueError):
            continue
        return schedule.mod["main"]
    return None


def _blocks(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _name(schedule: Any, block: Any) -> str:
    return str(schedule.get(block).name_hint)


def _extent(schedule: Any, loop: Any) -> int:
    """A loop's extent; 0 when it is known only at run time."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, int) or hasattr(extent, "value") else 0


def _static(schedule: Any, *loops: Any) -> list[int]:
    extents = [_extent(schedule, loop) for loop in loops]
    if 0 in extents:
        raise _DoesNotFitError
    return extents


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return max(d for d in range(1, max(1, min(number, limit)) + 1) if number % d == 0)


def _lanes_of(extent: int, lanes: int) -> int:
    """The largest power of two from 4 up to ``lanes`` that divides ``extent``; 0 if there is none."""
    while lanes >= 4:
        if extent and extent % lanes == 0:
            return lanes
        lanes //= 2
    return 0


def _is_reduction(schedule: Any, block: Any) -> bool:
    return any(int(i.iter_type) == 2 for i in schedule.get(block).iter_vars)


def _element_bits(schedule: Any, block: Any) -> int:
    dtype = str(schedule.get(block).writes[0].source.ty.dtype)
    return max(8, int("".join(c for c in dtype if c.isdigit()) or 8))


def _parallel(schedule: Any, loops: list[Any], work: int) -> None:
    """Fuses ``loops`` and runs them in parallel; ``work``: iterations of the whole nest, 0 if unknown."""
    if loops and (work == 0 or work >= _PARALLEL_MIN):
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _split_epilogue(schedule: Any, anchor: Any) -> Any:
    """Puts the result of ``anchor`` into registers and everything after it into one block, which is returned."""
    blocks = _blocks(schedule)
    index = [_name(schedule, b) for b in blocks].index(_name(schedule, anchor))
    for block in blocks[:index]:
        if _name(schedule, block) != "pad":
            schedule.compute_inline(block)
    after = blocks[index + 1 :]
    if any(_is_reduction(schedule, block) for block in after):
        raise _DoesNotFitError
    if not after:
        return schedule.cache_write(anchor, 0, "local")
    for block in after[:-1]:
        schedule.compute_inline(block)
    schedule.set_scope(anchor, 0, "local")
    return after[-1]


def _packed_conv2d(schedule: Any, vector_bits: int, registers: int) -> None:
    """Tile of (channel blocks, rows, columns) x lanes accumulators; loops (c, ky, kx) around it."""
    named = {_name(schedule, block): block for block in _blocks(schedule)}
    if "conv" not in named or "unpack" not in named:
        raise _DoesNotFitError
    conv = named["conv"]
    lanes = _static(schedule, schedule.get_loops(conv)[4])[0]
    final = _split_epilogue(schedule, conv)
    loops = schedule.get_loops(final)
    if len(loops) != 4:
        raise _DoesNotFitError
    b, o, y, x = loops
    channels, height, width = _static(schedule, o, y, x)
    blocks = _divisor(channels // lanes, 2)
    # A narrow vector unit takes several registers for one block of lanes.
    per_block = max(1, lanes * 32 // vector_bits)
    budget = max(1, (registers - _RESERVED) // (blocks * per_block))
    columns = _divisor(width, budget)
    rows = _divisor(height, budget // columns)
    o_outer, o_inner, lane = schedule.split(o, [None, blocks, lanes])
    y_outer, y_inner = schedule.split(y, [None, rows])
    x_outer, x_inner = schedule.split(x, [None, columns])
    schedule.reorder(b, o_outer, y_outer, x_outer, o_inner, y_inner, x_inner, lane)
    schedule.compute_at(conv, x_outer, preserve_unit_loops=True)
    inner = schedule.get_loops(conv)[4:]
    unit, o_inner_c, y_c, x_c, lane_c, c, ky, kx = inner
    schedule.reorder(c, ky, kx, unit, o_inner_c, y_c, x_c, lane_c)
    for tile in ([unit, o_inner_c, y_c, x_c, lane_c], [o_inner, y_inner, x_inner, lane]):
        schedule.vectorize(tile[-1])
        for loop in tile[:-1]:
            schedule.unroll(loop)
    if "pad" in named:
        _spatial(schedule, named["pad"], vector_bits)
    # Before the split into initialization and update: afterwards two blocks write the same buffer.
    schedule.parallel(schedule.fuse(b, o_outer, y_outer))
    schedule.decompose_reduction(conv, c)


def _matmul(schedule: Any, vector_bits: int, registers: int) -> None:
    """Tile of rows x vectors of columns; the reduction runs around it.  Operands (..., m, k) and (..., k, n)."""
    anchors = [b for b in _blocks(schedule) if "matmul" in _name(schedule, b) and _is_reduction(schedule, b)]
    if len(anchors) != 1:
        raise _DoesNotFitError
    anchor = anchors[0]
    kinds = [int(i.iter_type) for i in schedule.get(anchor).iter_vars]
    if kinds[-1] != 2 or 2 in kinds[:-1] or len(kinds) < 3 or not _walks_lanes(schedule, anchor, len(kinds) - 2):
        raise _DoesNotFitError
    width = vector_bits // _element_bits(schedule, anchor)
    final = _split_epilogue(schedule, anchor)
    loops = schedule.get_loops(final)
    if len(loops) != len(kinds) - 1:
        raise _DoesNotFitError
    *outer, m, n = loops
    columns, rows = _static(schedule, n)[0], _extent(schedule, m)
    lanes = _lanes_of(columns, width)
    if not lanes:
        raise _DoesNotFitError
    vectors = _divisor(columns // lanes, 4)
    tile_rows = _divisor(rows, max(1, (registers - _RESERVED) // vectors)) if rows else 1
    n_outer, n_inner, lane = schedule.split(n, [None, vectors, lanes])
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    schedule.reorder(*outer, m_outer, n_outer, m_inner, n_inner, lane)
    schedule.compute_at(anchor, n_outer, preserve_unit_loops=True)
    *units, m_c, n_c, k = schedule.get_loops(anchor)[len(outer) + 2 :]
    v_c, lane_c = schedule.split(n_c, [None, lanes])
    schedule.reorder(k, *units, m_c, v_c, lane_c)
    for tile in ([m_c, v_c, lane_c], [m_inner, n_inner, lane]):
        schedule.vectorize(tile[-1])
        for loop in tile[:-1]:
            schedule.unroll(loop)
    work = rows * columns * _extent(schedule, k)
    _parallel(schedule, [*outer, m_outer, n_outer], 0 if outer else work)
    schedule.decompose_reduction(anchor, k)


def _generic(schedule: Any, vector_bits: int, _registers: int) -> None:
    """Every block on its own: parallel outside, vectors inside."""
    if not _blocks(schedule):
        raise _DoesNotFitError
    for block in _blocks(schedule)[:-1]:
        consumers = schedule.get_consumers(block)
        if _is_reduction(schedule, block) or len(consumers) != 1 or _is_reduction(schedule, consumers[0]):
            continue
        if "pad" not in _name(schedule, block):
            schedule.compute_inline(block)
    for block in _blocks(schedule):
        kinds = [int(i.iter_type) for i in schedule.get(block).iter_vars]
        if len(kinds) != len(schedule.get_loops(block)) or not set(kinds) <= {0, 2}:
            raise _DoesNotFitError
        if 2 in kinds:
            _reduction(schedule, block, kinds, vector_bits)
        elif kinds:
            _spatial(schedule, block, vector_bits)


def _work(schedule: Any, loops: list[Any]) -> int:
    """Iterations of the nest; 0 if unknown."""
    total = 1
    for loop in loops:
        total *= _extent(schedule, loop)
    return total


def _spatial(schedule: Any, block: Any, vector_bits: int) -> None:
    loops = schedule.get_loops(block)
    work = _work(schedule, loops)
    *outer, last = loops
    lanes = _lanes_of(_extent(schedule, last), vector_bits // _element_bits(schedule, block))
    if lanes and _walks_lanes(schedule, block, len(loops) - 1):
        last_outer, lane = schedule.split(last, [None, lanes])
        schedule.vectorize(lane)
        outer.append(last_outer)
    _parallel(schedule, outer or [last], work)


def _reduction(schedule: Any, block: Any, kinds: list[int], vector_bits: int) -> None:
    loops = schedule.get_loops(block)
    work = _work(schedule, loops)
    spatial = [i for i, kind in enumerate(kinds) if kind == 0]
    reduces = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 2]
    outer = [loops[i] for i in spatial]
    if spatial and _walks_lanes(schedule, block, spatial[-1]):
        lanes = _lanes_of(_extent(schedule, outer[-1]), vector_bits // _element_bits(schedule, block))
        if lanes:
            last_outer, lane = schedule.split(outer[-1], [None, lanes])
            outer[-1] = last_outer
            schedule.reorder(*outer, *reduces, lane)
            schedule.vectorize(lane)
            _parallel(schedule, outer, work)
            schedule.decompose_reduction(block, reduces[0])
            return
    if outer:
        schedule.reorder(*outer, *reduces)
    _parallel(schedule, outer, work)


def _walks_lanes(schedule: Any, block: Any, index: int) -> bool:
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
