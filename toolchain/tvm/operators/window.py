"""Pooling and transposed convolution whose padding is given by a mode or an output size."""

from __future__ import annotations

from typing import Any

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported


def _pool(node: OpNode) -> Any:
    """Padding modes as explicit pads; the ones that TVM gets right stay as they are."""
    if node.text("auto_pad", "NOTSET") != "SAME_LOWER":
        return node.default()
    attrs = dict(node.attrs)
    kernel = [int(k) for k in attrs["kernel_shape"]]
    strides = [int(s) for s in attrs.get("strides", [1] * len(kernel))]
    dilations = [int(d) for d in attrs.get("dilations", [1] * len(kernel))]
    begins, ends = [], []
    for size, k, s, d in zip(node.shape(0)[2:], kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        begins.append(total - total // 2)
        ends.append(total // 2)
    return node.again({**attrs, "auto_pad": b"NOTSET", "pads": (*begins, *ends)})


def _conv_transpose(node: OpNode) -> Any:
    """With output_shape the pads follow from it; SAME modes mean an output of size times stride."""
    attrs = dict(node.attrs)
    mode = node.text("auto_pad", "NOTSET")
    if "output_shape" not in attrs and mode in ("NOTSET", "VALID"):
        return node.default()
    kernel = node.shape(1)[2:]
    rank = len(kernel)
    strides = [int(s) for s in attrs.get("strides", [1] * rank)]
    dilations = [int(d) for d in attrs.get("dilations", [1] * rank)]
    sizes = node.shape(0)[2:]
    wanted = [int(v) for v in attrs.get("output_shape", [n * s for n, s in zip(sizes, strides, strict=True)])]
    extra = [int(v) for v in attrs.get("output_padding", [0] * rank)]
    begins, ends = [], []
    for i in range(rank):
        total = strides[i] * (sizes[i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - wanted[i]
        if total < 0:
            # More outputs than any tap reaches at the end: zeros, as output_padding gives.
            extra[i], total = extra[i] - total, 0
            if extra[i] >= max(strides[i], dilations[i]):
                raise Unsupported("output_shape asks for more than the strides reach")
        small = total // 2
        lower = mode == "SAME_LOWER"
        begins.append(total - small if lower else small)
        ends.append(small if lower else total - small)
    attrs.pop("output_shape", None)
    return node.again({**attrs, "auto_pad": b"NOTSET", "pads": (*begins, *ends), "output_padding": tuple(extra)})


CONVERTERS: dict[str, Converter] = {
    "ConvTranspose": _conv_transpose,
    "LpPool": _pool,
    "MaxPool": _pool,
}
