"""The recurrent network of the benchmark, with seeded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gru(nn.Module):
    """Two GRU layers and a linear head.  Input: float32 [batch, sequence, 128].  Output: float32 [batch, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(128, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        y: Tensor = self.head(states[:, -1])
        return y


def gru() -> nn.Module:
    """Width 256, two layers."""
    torch.manual_seed(2)
    return Gru().eval()
