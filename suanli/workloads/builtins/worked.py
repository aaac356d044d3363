"""Worked examples: networks small enough to follow with a pencil, and three that set a scale."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from suanli.workloads.record import Inputs, Workload
from suanli.workloads.seeding import pictures, random_weights, seeded, values


def net_2_3_1(_root: Path | None) -> Workload:
    """Two inputs, three hidden ReLU, one output, with weights of one decimal."""
    return _small("worked-2-3-1", partial(_fixed, (2, 3, 1)), partial(_values, (2,)))


def net_3_2_2(_root: Path | None) -> Workload:
    """Three inputs, two hidden ReLU, two outputs, with weights of one decimal."""
    return _small("worked-3-2-2", partial(_fixed, (3, 2, 2)), partial(_values, (3,)))


def net_784_128_10(_root: Path | None) -> Workload:
    """A flat 28x28 picture through one hidden layer of 128 ReLU to ten logits."""
    return _small(
        "worked-784-128-10",
        partial(
            random_weights,
            lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        ),
        partial(_values, (784,)),
    )


def cnn_1000(_root: Path | None) -> Workload:
    """Two convolutions on 224x224 pictures and 1,000 classes."""
    return _small(
        "worked-cnn-1000",
        partial(
            random_weights,
            lambda: nn.Sequential(
                *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(128 * 49, 1000)),
            ),
        ),
        lambda batch: Inputs(args=(pictures(batch, 3, 224),)),
        max_batch=64,
    )


def rnn_5x256(_root: Path | None) -> Workload:
    """Five recurrent layers of 256 over 32 steps: [B, 32, 256] -> [B, 32, 256]."""
    return _small(
        "worked-rnn-5x256", partial(random_weights, _Recurrent), partial(_values, (32, 256))
    )


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.RNN(256, 256, num_layers=5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence: torch.Tensor = self.layers(x)[0]
        return sequence


def _fixed(widths: tuple[int, int, int]) -> nn.Module:
    """Weight j of unit i is (i + j + 1) / 10, negative where i + j is odd; biases are 0.1."""
    with seeded():
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    with torch.no_grad():
        for layer in layers:
            for i in range(layer.out_features):
                for j in range(layer.in_features):
                    layer.weight[i, j] = (-1) ** (i + j) * (i + j + 1) / 10
            layer.bias.fill_(0.1)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


def _values(shape: tuple[int, ...], batch: int) -> Inputs:
    return Inputs(args=(values(batch, *shape),))


def _small(
    name: str,
    make_model: Callable[[], nn.Module],
    make_inputs: Callable[[int], Inputs],
    max_batch: int = 1024,
) -> Workload:
    return Workload(
        name=name,
        make_model=make_model,
        make_inputs=make_inputs,
        max_batch=max_batch,
        note="a worked example: its answers mean nothing",
    )
