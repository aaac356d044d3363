"""Networks made to be trained in seconds or minutes.

`cifar10_fast` has the shape of Keller Jordan's airbench94 (https://arxiv.org/abs/2404.00498):
a frozen whitening layer and three blocks of convolutions, of which the last has one more.
`mnist_fast` has two convolutions and two linear layers.
"""

from itertools import chain

from torch import Tensor, nn

_WHITENED = 24  # directions of 2x2 patches of three channels, and their negatives
_WIDTHS = (64, 256, 256)
_CONVOLUTIONS = (2, 2, 3)  # a third is cheap where images are 3x3


class Scaled(nn.Module):
    """Multiplies with a constant, such as logits with 1/256."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        """The same shape."""
        return values * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"{self.factor:g}"


def _block(inputs: int, outputs: int, convolutions: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for place in range(convolutions):
        parts.append(nn.Conv2d(outputs if place else inputs, outputs, 3, padding=1, bias=False))
        if place == 0:
            parts.append(nn.MaxPool2d(2))
        parts += [_norm(outputs), nn.GELU()]
    return parts


def _norm(width: int) -> nn.BatchNorm2d:
    """Batch norm whose scale stays 1; only its shift is learnt."""
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def cifar10_fast() -> nn.Module:
    """[B, 3, 32, 32] -> logits [B, 10]; the first layer is for whitening filters that are kept."""
    first = nn.Conv2d(3, _WHITENED, 2)
    first.weight.requires_grad_(False)
    widths = (_WHITENED, *_WIDTHS[:-1])
    blocks = [_block(*sizes) for sizes in zip(widths, _WIDTHS, _CONVOLUTIONS, strict=True)]
    return nn.Sequential(
        first,
        nn.GELU(),
        *chain.from_iterable(blocks),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(_WIDTHS[-1], 10, bias=False),
        Scaled(1 / _WIDTHS[-1]),
    )


def mnist_fast() -> nn.Module:
    """[B, 1, 28, 28] -> logits [B, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


NETWORKS = {"cifar10-fast": cifar10_fast, "mnist-fast": mnist_fast}
