"""Networks beyond the benchmark's list, asked for by name: operators and layouts that the list has not.

Definitions of our own after the papers' building blocks, with seeded weights: what they compute is of no use, what it
costs is that of their kind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Halving and doubling with shortcuts (Ronneberger et al. 2015), by transposed convolution or interpolation."""

    def __init__(self, width: int, interpolate: bool) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList([_double(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True)])
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2 * w, w, 1))
            if interpolate
            else nn.ConvTranspose2d(2 * w, w, 2, stride=2)
            for w in widths[-2::-1]
        )
        self.join = nn.ModuleList([_double(2 * w, w) for w in widths[-2::-1]])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        kept, x = [], image
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else functional.max_pool2d(x, 2))
            kept.append(x)
        for up, join, shortcut in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([shortcut, up(x)], dim=1))
        mask: Tensor = self.head(x)
        return mask


class ConvNextBlock(nn.Module):
    """7x7 depthwise convolution, then a network over channels, which come last (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.network(self.depthwise(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Input: float32 [batch, 3, height, width].  Output: logits, float32 [batch, 1000]."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (2, 2, 4, 2)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), nn.GroupNorm(1, widths[0])]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers += [nn.GroupNorm(1, widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, stride=2)]
            layers += [ConvNextBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 1000))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(image).mean(dim=(2, 3)))
        return logits


class GroupedBlock(nn.Module):
    """Bottleneck with 32 groups (Xie et al. 2017)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=32, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width),
        )  # fmt: skip
        same = stride == 1 and inputs == 2 * width
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, 2 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class ResNext(nn.Module):
    """ResNeXt of width 4 a group in its first stage, two blocks a stage."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for stage, width in enumerate((128, 256, 512, 1024)):
            for number in range(2):
                layers.append(GroupedBlock(inputs, width, 2 if stage and number == 0 else 1))
                inputs = 2 * width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits


class _Styled(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(size // 2), nn.Conv2d(inputs, outputs, size, stride),
            nn.InstanceNorm2d(outputs, affine=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _StyledResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _Styled(width, width, 3), _Styled(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return x + y


class StyleTransfer(nn.Module):
    """Image to image with reflected borders, instance normalization, nearest upsampling (Johnson et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Styled(3, 32, 9), nn.ReLU(), _Styled(32, 64, 3, 2), nn.ReLU(), _Styled(64, 128, 3, 2), nn.ReLU(),
            _StyledResidual(128), _StyledResidual(128), _StyledResidual(128),
            nn.Upsample(scale_factor=2), _Styled(128, 64, 3), nn.ReLU(),
            nn.Upsample(scale_factor=2), _Styled(64, 32, 3), nn.ReLU(),
            nn.ReflectionPad2d(4), nn.Conv2d(32, 3, 9),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        styled: Tensor = self.layers(image)
        return styled


class VideoNet(nn.Module):
    """Convolutions over time, height and width (Tran et al. 2015), on eight frames of 56 by 56."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, 400),
        )  # fmt: skip

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.layers(clip)
        return logits


def _seeded(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear):
            fan = module.weight[0].numel()
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (1.5 / fan) ** 0.5)
    return model.eval()


def unet() -> nn.Module:
    """With transposed convolutions."""
    return _seeded(UNet(16, False), 11)


def unet_bilinear() -> nn.Module:
    """With bilinear interpolation."""
    return _seeded(UNet(16, True), 12)


def convnext() -> nn.Module:
    """A small ConvNeXt."""
    return _seeded(ConvNext(), 13)


def resnext() -> nn.Module:
    """A small ResNeXt."""
    return _seeded(ResNext(), 14)


def style_transfer() -> nn.Module:
    """Style transfer with three residual blocks."""
    return _seeded(StyleTransfer(), 15)


def video() -> nn.Module:
    """Three 3-d convolutions."""
    return _seeded(VideoNet(), 16)
