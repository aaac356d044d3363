"""U-Net (Ronneberger et al., arXiv 1505.04597) with padding and batch norm, four levels."""

import torch
from torch import nn


def _double(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """[B, channels, S, S] -> per-pixel logits [B, classes, S, S]; S is a multiple of 16.

    Args:
        channels: Of the picture.
        classes: Of a pixel.
        width: Channels of the first level; each of the four levels doubles it.
    """

    def __init__(self, channels: int = 3, classes: int = 2, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(
            _double(first, second)
            for first, second in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = _double(widths[-1], 2 * widths[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths))
        self.merge = nn.ModuleList(_double(2 * w, w) for w in reversed(widths))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of every pixel."""
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(kept), strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        logits: torch.Tensor = self.head(x)
        return logits
