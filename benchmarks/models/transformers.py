"""Transformers of the benchmark: ViT-tiny and one decoding step of a GPT, with seeded weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention; with a past, of new tokens over the past ones and themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` is [batch, tokens, width]; returns the same, and the new keys and values [batch, heads, tokens, -1]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, new_keys, new_values = qkv[0], qkv[1], qkv[2]
        keys, values = new_keys, new_values
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        scores = query @ keys.transpose(-1, -2) / math.sqrt(width // self.heads)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, tokens, width)
        return self.out(mixed), new_keys, new_values


class Block(nn.Module):
    """Attention and a feed-forward net of four times the width, each after a layer norm, with shortcuts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mixed, keys, values = self.attention(self.norm1(x), past)
        x = x + mixed
        return x + self.feed(self.norm2(x)), keys, values


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020).  Input: float32 [batch, 3, 224, 224].  Output: float32 [batch, 1000]."""

    def __init__(self, width: int, layers: int, heads: int, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.positions = nn.Parameter(torch.randn(1, (224 // patch) ** 2 + 1, width) * 0.5)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)[0]
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class Decoder(nn.Module):
    """One step of a GPT-2-like decoder: one new token after ``past`` cached ones.

    Inputs: ``token`` int64 [batch, 1], ``past_keys`` and ``past_values`` float32 [batch, layers, heads, past, 64].
    Outputs: logits float32 [batch, 1, words], the new keys and values float32 [batch, layers, heads, 1, 64].
    """

    def __init__(self, width: int, layers: int, heads: int, words: int, positions: int = 1024) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, token: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = past_keys.shape[3]
        x = self.words(token) + self.positions.weight[at : at + 1]
        keys, values = [], []
        for number, block in enumerate(self.blocks):
            x, key, value = block(x, (past_keys[:, number], past_values[:, number]))
            keys.append(key)
            values.append(value)
        return self.head(self.norm(x)), torch.stack(keys, 1), torch.stack(values, 1)


def vit_tiny() -> nn.Module:
    """Width 192, 12 layers, 3 heads, patches of 16: 5.7 million parameters."""
    torch.manual_seed(16)
    return VisionTransformer(192, 12, 3).eval()


def gpt() -> nn.Module:
    """Width 512, 6 layers, 8 heads, 32,000 words."""
    torch.manual_seed(6)
    return Decoder(512, 6, 8, 32000).eval()
