"""Weights and images from a seed, the same bits on every machine.

Weights come from numpy's PCG64 and plain arithmetic, not from torch's generators, whose normal numbers depend
on the processor's vector width.  Batch-norm statistics are taken from a forward pass in float64 and rounded to
few digits, which hides the last bits in which processors differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_STATISTICS_IMAGES, _STATISTICS_SIZE = 4, 224


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every weight, set the batch-norm statistics, and put the model in eval mode; in place.

    Convolutions and linear layers get He's uniform distribution (He et al. 2015).  Without statistics that fit
    the activations, a network with random weights answers every image alike, and its fidelity says nothing.
    """
    generator = np.random.default_rng(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = math.sqrt(6 / module.weight[0].numel())
            values = (generator.random(module.weight.shape, dtype=np.float32) * 2 - 1) * np.float32(bound)
            module.weight.data = torch.from_numpy(values)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _set_statistics(model, seed)
    return model.eval()


def _set_statistics(model: nn.Module, seed: int) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become those of this one batch
    model.double().train()
    with torch.no_grad():
        logits = model(torch.from_numpy(smooth_images(_STATISTICS_IMAGES, _STATISTICS_SIZE, seed)).double())
    model.float()
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(_in_steps(norm.running_mean))
        norm.running_var.copy_(norm.running_var.bfloat16().float())
    # What all images have in common would dominate every similarity: the last bias takes it out.
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.data = _in_steps(-logits.mean(0)).float()


def _in_steps(values: torch.Tensor) -> torch.Tensor:
    """Rounded to steps of 1/1024: many means are zero but for rounding errors, which are all noise."""
    return values.mul(1024).round().div(1024) + 0.0  # -0.0 + 0.0 is 0.0


def smooth_images(count: int, size: int, seed: int) -> NDArray[np.float32]:
    """Random smooth colour fields: noise on grids of 2 to 32 cells, enlarged linearly and added.

    Each image has a fineness, a contrast and a colour cast of its own; images that differ in their details alone
    are all the same to a network that ends in an average over the picture.

    Args:
        count: number of images.
        size: height and width in pixels.
        seed: of the noise.

    Returns:
        float32 [count, 3, size, size], about -4 to 4, like photographs normalised with their mean and deviation.
    """
    generator = np.random.default_rng(seed)
    images = np.zeros((count, 3, size, size), np.float64)
    for cells in (2, 4, 8, 16, 32):
        grid = generator.random((count, 3, cells + 1, cells + 1)) - 0.5
        share = generator.random((count, 1, 1, 1)) ** 2
        images += _enlarge(_enlarge(grid, size).swapaxes(2, 3), size).swapaxes(2, 3) * share
    images -= images.mean((1, 2, 3), keepdims=True)
    images /= images.std((1, 2, 3), keepdims=True)
    contrast = 0.25 + generator.random((count, 1, 1, 1))
    cast = 2 * generator.random((count, 3, 1, 1)) - 1
    return np.asarray(images * contrast + cast, np.float32)


def _enlarge(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Linear interpolation of the last axis to ``size`` points."""
    position = np.arange(size) * ((values.shape[-1] - 1) / size)
    left = position.astype(np.int64)
    share = position - left
    enlarged: NDArray[np.float64] = values[..., left] * (1 - share) + values[..., left + 1] * share
    return enlarged


def batches(count: int, batch: int, seed: int) -> Iterator[dict[str, NDArray[np.float32]]]:
    """``count`` images of 224x224 as input ``image``, made ``batch`` at a time."""
    for start in range(0, count, batch):
        yield {"image": smooth_images(min(batch, count - start), 224, seed + start)}
