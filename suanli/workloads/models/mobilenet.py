"""MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2)."""

import torch
from torch import nn
from torch.nn import functional

# expansion factor, output channels, repeats, stride of the first
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _unit(channels_in: int, channels_out: int, kernel: int, stride: int, groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(
            channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Widen 1x1, depthwise 3x3, narrow 1x1 without activation; added to its input where it fits."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        parts: list[nn.Module] = []
        if expansion != 1:
            parts.append(_unit(channels_in, hidden, 1, 1, 1))
        parts.append(_unit(hidden, hidden, 3, stride, hidden))
        parts += [nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)]
        self.body = nn.Sequential(*parts)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H/stride, W/stride]."""
        y: torch.Tensor = self.body(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """[B, 3, 224, 224] -> logits [B, classes]: 3.5 million parameters, 0.6 GFLOP."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        parts: list[nn.Module] = [_unit(3, 32, 3, 2, 1)]
        current = 32
        for expansion, channels, repeats, first_stride in _STAGES:
            for position in range(repeats):
                stride = first_stride if position == 0 else 1
                parts.append(InvertedResidual(current, channels, stride, expansion))
                current = channels
        parts.append(_unit(current, 1280, 1, 1, 1))
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of pictures."""
        pooled = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: torch.Tensor = self.head(pooled)
        return logits
