"""A small convolutional network for 8x8 grey images: 40,506 parameters."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU, two poolings, two linear layers.

    Input: float32 [batch, 1, 8, 8], 0..1.  Output: logits, float32 [batch, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 16),
            *_block(16, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(image))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # No bias: the batch norm that follows has one.
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def build() -> nn.Module:
    """The untrained network; its weights are in digits.safetensors."""
    return DigitsNet()
