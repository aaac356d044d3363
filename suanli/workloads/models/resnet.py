"""Residual networks (He et al., arXiv 1512.03385), with the stems of ImageNet and of CIFAR."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [B, C_in, H, W] -> [B, C, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels_in, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform and add the shortcut."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the 3x3 (version 1.5)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform and add the shortcut."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.shortcut(x))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
    )


class ResNet(nn.Module):
    """A residual classifier: [B, channels, H, W] -> logits [B, classes].

    Args:
        block: Kind of block.
        depths: Blocks per stage; every stage but the first halves the picture.
        widths: Width per stage.
        stem: "imagenet" (7x7, stride 2, max-pool) or "cifar" (3x3, stride 1).
        channels: Channels of the input.
        classes: Number of logits.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        stem: Literal["imagenet", "cifar"] = "imagenet",
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        current = widths[0]
        self.stem = _stem(stem, channels, current)
        stages = []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(current, width, stride))
                current = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(current, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of pictures."""
        features = self.stages(self.stem(x))  # [B, C, H', W']
        pooled = functional.adaptive_avg_pool2d(features, 1).flatten(1)  # [B, C]
        logits: torch.Tensor = self.head(pooled)
        return logits


def _stem(kind: str, channels: int, width: int) -> nn.Sequential:
    if kind == "imagenet":
        convolution = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        return nn.Sequential(
            convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        )
    convolution = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def resnet18(classes: int = 1000) -> ResNet:
    """ResNet-18 for 224x224 pictures: 11.69 million parameters, 3.6 GFLOP."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes=classes)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50 v1.5 for 224x224 pictures: 25.56 million parameters, 8.2 GFLOP."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes=classes)


def resnet18_cifar() -> ResNet:
    """ResNet-18 for 32x32 pictures in ten classes: 11.17 million parameters, 1.1 GFLOP."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stem="cifar", classes=10)


def digits_resnet() -> ResNet:
    """A small residual network for 32x32 grey digits: 1.23 million parameters, 0.38 GFLOP."""
    return ResNet(
        BasicBlock, (1, 1, 1), widths=(64, 128, 256), stem="cifar", channels=1, classes=10
    )
