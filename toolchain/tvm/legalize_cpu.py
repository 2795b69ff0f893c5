"""CPU loop nests of our own for operators whose default form can't be vectorized well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolchain.tvm.library import load_tvm

Legalizer = Callable[[Any, Any], Any]


def legalizers(vector_bits: int) -> dict[str, Legalizer]:
    """Operator name -> function from a block builder and a call to its replacement, for ``LegalizeOps``."""
    return {"relax.nn.conv2d": lambda builder, call: _conv2d(builder, call, max(4, vector_bits // 32))}


def channel_block(channels: int, lanes: int) -> int:
    """The largest power of two up to ``lanes`` (at least 4) that divides ``channels``; 0 if there is none."""
    while lanes >= 4:
        if channels % lanes == 0:
            return lanes
        lanes //= 2
    return 0


def _conv2d(builder: Any, call: Any, lanes: int) -> Any:
    """Convolution of NCHW data with constant weights, vectorized over output channels.

    data: (n, ic, h, w) float32; weights: (oc, ic, kh, kw), packed at compile time to
    (oc / v, ic, kh, kw, v); output: (n, oc, oh, ow).  Data keep their layout: each value is broadcast to v
    accumulators, and only the final store is strided.
    """
    load_tvm()
    import numpy as np
    from tvm import ir, relax
    from tvm.relax.transform.legalize_ops.nn import _nn_conv2d

    attrs, weight = call.attrs, call.args[1]
    plain = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout) == ("NCHW", "OIHW", "NCHW")
    if not (isinstance(weight, ir.GenericConst) and plain and int(attrs.groups) == 1):
        return _nn_conv2d(builder, call)
    values = weight.value.numpy()
    block = channel_block(values.shape[0], lanes)
    if values.dtype != np.float32 or not block:
        return _nn_conv2d(builder, call)
    oc, ic, kh, kw = values.shape
    packed = np.ascontiguousarray(values.reshape(oc // block, block, ic, kh, kw).transpose(0, 2, 3, 4, 1))
    strides, padding, dilation = ([int(v) for v in f] for f in (attrs.strides, attrs.padding, attrs.dilation))
    weights = relax.const(packed)
    return builder.call_te(
        _packed_conv2d, call.args[0], weights, strides, padding, dilation, primfunc_name_hint="conv2d_packed"
    )


def _packed_conv2d(data: Any, weight: Any, strides: list[int], padding: list[int], dilation: list[int]) -> Any:
    from tvm import te, topi

    n, ic, h, w = data.shape
    _, _, kh, kw, block = (int(v) for v in weight.shape)
    top, left, bottom, right = padding
    padded = topi.nn.pad(data, [0, 0, top, left], [0, 0, bottom, right], name="pad") if any(padding) else data
    out_h = (h + top + bottom - (kh - 1) * dilation[0] - 1) // strides[0] + 1
    out_w = (w + left + right - (kw - 1) * dilation[1] - 1) // strides[1] + 1
    c = te.reduce_axis((0, ic), "c")
    ky, kx = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    blocks = int(weight.shape[0])
    conv = te.compute(
        (n, blocks, out_h, out_w, block),
        lambda b, o, y, x, lane: te.sum(
            padded[b, c, y * strides[0] + ky * dilation[0], x * strides[1] + kx * dilation[1]]
            * weight[o, c, ky, kx, lane],
            axis=[c, ky, kx],
        ),
        name="conv",
    )
    return te.compute(
        (n, blocks * block, out_h, out_w), lambda b, o, y, x: conv[b, o // block, y, x, o % block], name="unpack"
    )
