"""MobileNetV2 (Sandler et al. 2018, "Inverted Residuals and Linear Bottlenecks"), 3,504,872 parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .seeded import initialise

SEED = 2
# Table 2 of the paper: expansion, output channels, repeats, stride of the first.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; with a shortcut where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = _conv(inputs, hidden, 1) if expansion != 1 else []
        layers += _conv(hidden, hidden, 3, stride, groups=hidden)
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Input: float32 [batch, 3, height, width].  Output: logits, float32 [batch, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers = _conv(3, 32, 3, stride=2)
        inputs = 32
        for expansion, outputs, repeats, stride in STAGES:
            for number in range(repeats):
                layers.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion))
                inputs = outputs
        layers += _conv(inputs, 1280, 1)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(image))
        return logits


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


def build() -> nn.Module:
    """MobileNetV2 with seeded random weights, in eval mode."""
    return initialise(MobileNetV2(), SEED)
