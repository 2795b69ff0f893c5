"""Small models, each with one thing that an exporter can get wrong."""

from pathlib import Path

import torch
from blocks import Eig, Gate
from torch import nn


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)
        # Fresh statistics are the identity: a wrongly folded batch norm would pass unseen.
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, image):
        return self.head(self.drop(torch.relu(self.norm(self.conv(image))).mean((2, 3))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)

    def forward(self, ids, weight, *, scale=None):
        result = (self.embed(ids) * weight[..., None]).sum(1)
        return result if scale is None else result * scale


class DictOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return {"logits": self.a(x), "extra": {"left": self.b(x), "none": None}, "best": self.a(x).argmax(1)}


class Nested(nn.Module):
    def forward(self, x):
        doubled = x * 2
        return doubled, (x + 1, {"k": x - 1}), doubled, x, torch.ones(2)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x):
        result, (hidden, _) = self.lstm(x)
        return result[:, -1], hidden


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids, mask):
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)
        weights = mask[..., None].float()
        return (hidden * weights).sum(1) / weights.sum(1)


class Clash(nn.Module):
    def forward(self, x):
        hidden = torch.relu(x)
        return torch.sigmoid(hidden) + hidden


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


class FixedSize(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) @ torch.ones(16, 3)


class NotANumber(nn.Module):
    def forward(self, x):
        return {"fine": x, "bad": torch.log(x - 100)}


class Frozen(nn.Module):
    """Holds a size in Python: tracing keeps whatever it was."""

    def forward(self, x):
        return x + len(x.tolist())


class PlainNumber(nn.Module):
    def forward(self, x):
        return {"y": x, "n": 3}


def cnn():
    return Cnn()


def two_inputs():
    return TwoInputs()


def dict_out():
    return DictOut()


def nested():
    return Nested()


def lstm():
    return Lstm()


def transformer():
    return Transformer().train()


def clash():
    return Clash()


def gate():
    return Wrapped(Gate())


def eig():
    return Wrapped(Eig())


def fixed_size():
    return FixedSize()


def not_a_number():
    return NotANumber()


def plain_number():
    return PlainNumber()


def path_of_file():
    return Path("saved.onnx")


def not_a_model():
    return {"a": 1}


def cnn_example():
    return {"image": torch.randn(3, 1, 8, 8)}


def not_a_weight():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    return model
