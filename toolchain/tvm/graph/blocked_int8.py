"""Convolutions of 8-bit values in blocked layout: weights packed for the target's instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of
from toolchain.tvm.intrinsics import DATA_TYPE, FITS, NEON, PAIR, QUAD, grouping
from toolchain.tvm.loops import OUT_FUSIBLE, i8mm
from toolchain.tvm.loops.conv import Conv2d, choose_conv_tile, merge_groups
from toolchain.tvm.loops.conv_int8 import (
    ConvMarks,
    conv2d_int8,
    depthwise2d_int8,
    pack_depthwise,
    pack_weights,
    products_fit,
)
from toolchain.tvm.loops.i8mm import conv2d_i8mm
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import NEON_SCRATCH, ceil_div

if TYPE_CHECKING:
    import numpy as np

_MERGED = 4
"""Most groups computed as one, with zeros between them: beyond that the loop nest for any product is no slower."""

Block = Callable[[Any, int], Any]
"""Gives a plain image in blocked layout, for a number of lanes."""


@dataclass(frozen=True, slots=True)
class _Data:
    """What a convolution reads: a plain image, and what its padding is filled with."""

    image: Any
    conv: Conv2d
    fill: int


def conv2d_blocked(graph: Graph, call: Any, conv: Conv2d, machine: Machine, block: Block) -> Any:
    """The blocked int32 output of a ``relax.nn.conv2d`` of 8-bit data and constant s8 weights, or None."""
    weights = constant_of(graph.definition(call.args[1]))
    if weights is None or str(weights.dtype) != "int8" or dtype_of(graph.builder.normalize(call)) != "int32":
        return None
    data, lanes, dot = _unpadded(graph, call.args[0], conv), machine.lanes("int32"), machine.dot()
    shape, (oc, per_group) = shape_of(data.image), weights.shape[:2]
    if shape is None:
        return None
    if conv.groups == oc and per_group == 1:
        return _depthwise(graph, data, weights, machine, block)
    if conv.groups > 1:
        merged = merge_groups(weights, conv, lanes, _MERGED)
        if merged is None:
            return None
        weights, conv = merged
        data, per_group = replace(data, conv=replace(data.conv, groups=conv.groups)), weights.shape[1]
    width = QUAD if per_group <= QUAD and lanes > QUAD else lanes
    source, data, shift = _signed(graph, block(data.image, width), data, dot)
    out = data.conv.output(shape[2], shape[3], weights.shape[2:])
    packed, nest = _packed(weights, data, out, width, machine)
    made = graph.emit(
        graph.builder.call_te(
            nest,
            source,
            _constant(packed),
            primfunc_name_hint="conv2d_int8",
            primfunc_attrs={"op_pattern": OUT_FUSIBLE},
        )
    )
    return _corrected(graph, made, shift * weights.astype("int64").sum((1, 2, 3)), lanes)


def _packed(
    weights: np.ndarray, data: _Data, out: tuple[Any, Any], width: int, machine: Machine
) -> tuple[np.ndarray, Callable[..., Any]]:
    """Weights (oc, ic, kh, kw) for the target's instruction, and the loop nest of data and them."""
    oc, per_group = weights.shape[:2]
    lanes, dot = machine.lanes("int32"), machine.dot()
    channels, vectors = ceil_div(oc, lanes), ceil_div(oc // data.conv.groups, lanes)
    room = machine.room(per_group * weights[0, 0].size // 4, "int32")
    # The instruction for matrices takes two pixels, and two blocks of four channels each.
    single = isinstance(out[1], int) and out[1] == 1
    if dot == "i8mm" and not single and per_group > QUAD:
        room = replace(room, operands=PAIR)
        rows, tile = choose_conv_tile(data.conv, out, vectors, room, PAIR)
        marks = ConvMarks(rows, tile, data.fill, FITS)
        packed = i8mm.pack_weights(weights, width, tile.vectors)
        return packed, lambda x, w: conv2d_i8mm(x, w, data.conv, channels, marks)
    if dot in NEON:
        room = replace(room, operands=PAIR, scratch=NEON_SCRATCH)
    rows, tile = choose_conv_tile(data.conv, out, vectors, room)
    packed = pack_weights(weights, lanes, width, tile.vectors, *grouping(dot))
    marks = ConvMarks(rows, tile, data.fill, products_fit(packed, dot))
    return packed, lambda x, w: conv2d_int8(x, w, data.conv, channels, marks)


def _depthwise(graph: Graph, data: _Data, weights: np.ndarray, machine: Machine, block: Block) -> Any:
    lanes = machine.lanes("int32")
    shape = shape_of(data.image)
    assert shape is not None
    _, width = data.conv.output(shape[2], shape[3], weights.shape[2:])
    most = max(1, min(14, machine.registers // 2 - 1))
    columns = ceil_div(width, ceil_div(width, most)) if isinstance(width, int) else 4
    made = graph.builder.call_te(
        lambda x, w: depthwise2d_int8(x, w, data.conv, columns, data.fill),
        block(data.image, lanes),
        _constant(pack_depthwise(weights, lanes)),
        primfunc_name_hint="depthwise2d_int8",
        primfunc_attrs={"op_pattern": OUT_FUSIBLE},
    )
    return graph.emit(made)


def _unpadded(graph: Graph, image: Any, conv: Conv2d) -> _Data:
    """Padding with a constant that was done before belongs to the convolution."""
    made = graph.definition(image)
    if operator_of(made) != "relax.nn.pad" or any(conv.padding) or str(made.attrs.pad_mode) != "constant":
        return _Data(image, conv, 0)
    width = ints(made.attrs.pad_width)
    if any(width[:4]):
        return _Data(image, conv, 0)
    top, bottom, left, right = width[4:]
    inner = Conv2d(conv.strides, (top, left, bottom, right), conv.dilation, conv.groups)
    return _Data(made.args[0], inner, int(float(made.attrs.pad_value)))


def _signed(graph: Graph, source: Any, data: _Data, dot: str) -> tuple[Any, _Data, int]:
    """Blocked data of the type that the instruction takes, its padding, and what each value was shifted by."""
    value, fill, shift = matching(graph, source, dot, data.fill)
    return value, _Data(data.image, data.conv, fill), shift


def matching(graph: Graph, source: Any, dot: str, fill: int = 0) -> tuple[Any, int, int]:
    """8-bit ``source`` as the type that ``dot`` takes, ``fill`` likewise, and what to add per unit of weight.

    s8 and u8 differ by 128, which is flipping the highest bit.
    """
    from tvm import relax

    dtype, wanted = dtype_of(source), DATA_TYPE.get(dot, "")
    if not wanted or wanted == dtype:
        return source, fill, 0
    flipped = relax.op.bitwise_xor(source, relax.const(-128 if dtype == "int8" else 128, dtype))
    shift = 128 if wanted == "uint8" else -128
    return graph.emit(relax.op.astype(graph.emit(flipped), wanted)), fill + shift, -shift


def _corrected(graph: Graph, value: Any, by: np.ndarray, lanes: int) -> Any:
    """Blocked int32 ``value`` plus a constant for each channel."""
    import numpy as np
    from tvm import relax

    if not by.any():
        return value
    padded = np.zeros(ceil_div(by.size, lanes) * lanes, np.int32)
    padded[: by.size] = by
    return graph.emit(relax.op.add(value, _constant(padded.reshape(1, -1, 1, 1, lanes))))


def _constant(value: np.ndarray) -> Any:
    from tvm import relax

    return relax.const(value, str(value.dtype))
