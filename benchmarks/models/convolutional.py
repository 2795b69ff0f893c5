"""Convolutional networks of the benchmark: ResNets of any depth and EfficientNet-B0, with seeded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipes.vision.resnet import BasicBlock
from recipes.vision.seeded import initialise, smooth_images


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions beside a shortcut (He et al. 2015, figure 5)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.layers = nn.Sequential(
            *_conv(inputs, width, 1), nn.ReLU(),
            *_conv(width, width, 3, stride), nn.ReLU(),
            *_conv(width, outputs, 1),
        )  # fmt: skip
        change = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Sequential(*_conv(inputs, outputs, 1, stride)) if change else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.layers(x) + self.shortcut(x))
        return y


class ResNet(nn.Module):
    """Input: float32 [batch, 3, height, width].  Output: logits, float32 [batch, classes]."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        stem = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                blocks.append(block(inputs, outputs, 2 if number == 0 and stage else 1))
                inputs = outputs
        self.layers = nn.Sequential(*stem, *blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(image))
        return logits


class SqueezeExcite(nn.Module):
    """Channels scaled by what two 1x1 convolutions make of their averages (Hu et al. 2017)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1), nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.gate(x)
        return scaled


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excitation, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [*_conv(inputs, hidden, 1), nn.SiLU()] if expansion != 1 else []
        layers += [*_conv(hidden, hidden, kernel, stride, hidden), nn.SiLU(), SqueezeExcite(hidden, inputs // 4)]
        self.layers = nn.Sequential(*layers, *_conv(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNet(nn.Module):
    """EfficientNet-B0 (Tan and Le 2019, table 1).  Input and output as those of :class:`ResNet`."""

    # Expansion, kernel, stride of the first, output channels, repeats.
    STAGES = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.SiLU()]
        inputs = 32
        for expansion, kernel, stride, outputs, repeats in self.STAGES:
            for number in range(repeats):
                layers.append(MBConv(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        layers += [*_conv(inputs, 1280, 1), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(image))
        return logits


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def resnet34() -> nn.Module:
    """Basic blocks, 21.8 million parameters."""
    return initialise(ResNet(BasicBlock, (64, 128, 256, 512), (3, 4, 6, 3)), 34)


def resnet50() -> nn.Module:
    """Bottleneck blocks, 25.6 million parameters."""
    return initialise(ResNet(Bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3)), 50)


def resnet101() -> nn.Module:
    """Bottleneck blocks, 44.5 million parameters."""
    return initialise(ResNet(Bottleneck, (256, 512, 1024, 2048), (3, 4, 23, 3)), 101)


def efficientnet_b0() -> nn.Module:
    """5.3 million parameters."""
    return _settle(initialise(EfficientNet(), 10), 10)


def _settle(model: nn.Module, seed: int) -> nn.Module:
    """Batch-norm statistics from grainy images, in place.

    Those from smooth ones alone have channels of almost no variance, which blow up on the random inputs that the
    toolchain checks its conversions with, until rounding errors are all that is compared.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(smooth_images(4, 224, seed))
    images += torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        model.train()(images)
    return model.eval()
