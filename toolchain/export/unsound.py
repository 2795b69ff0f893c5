"""Weights that are no numbers, as the cause of outputs that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unsound_weights(module: torch.nn.Module) -> str:
    """The first parameter that holds NaN or infinity, or buffer that holds NaN, in words; ``""`` if there is none.

    Buffers may hold infinities: masks do.
    """
    import torch

    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            bad = ~torch.isfinite(tensor) if kind == "parameter" else torch.isnan(tensor)
            if count := int(bad.sum()):
                what = "NaN or infinity" if kind == "parameter" else "NaN"
                return f"the {kind} {name!r} holds {what} ({count} of {tensor.numel()} values)"
    return ""
