"""The five small networks of the articles, as written there, in plain torch."""

from collections.abc import Callable

import torch
from torch import nn


class KerasInitialised(nn.Sequential):
    """A sequence whose layers start as Keras starts them: Glorot-uniform weights, zero biases."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _started(layers: list[nn.Module]) -> nn.Module:
    model = KerasInitialised(*layers)
    model.reset_parameters()
    return model


def mnist_cnn() -> nn.Module:
    """[B, 1, 28, 28] -> probabilities [B, 10]: 93,322 parameters."""
    return _started(
        [
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(dim=1)),
        ]
    )


def mnist_cnn_small() -> nn.Module:
    """[B, 1, 28, 28] -> logits [B, 10]: 693,962 parameters."""
    return _started(
        [
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(5408, 128), nn.ReLU(), nn.Linear(128, 10)),
        ]
    )


def mnist_mlp() -> nn.Module:
    """[B, 1, 28, 28] -> logits [B, 10]: 235,146 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def cifar10_cnn() -> nn.Module:
    """[B, 3, 32, 32] -> logits [B, 10]: 122,570 parameters."""
    return _started(
        [
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)),
        ]
    )


def cifar10_lenet() -> nn.Module:
    """[B, 3, 32, 32] -> logits [B, 10]: 62,006 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def cross_entropy_of_probabilities(
    probabilities: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean of -log p(label), clipped at 1e-7 as Keras does for outputs behind a softmax.

    Args:
        probabilities: [B, classes].
        labels: [B].
    """
    chosen = probabilities.gather(1, labels.unsqueeze(1)).clamp(1e-7, 1.0 - 1e-7)
    return -chosen.log().mean()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mnist-cnn": mnist_cnn,
    "mnist-cnn-small": mnist_cnn_small,
    "mnist-mlp": mnist_mlp,
    "cifar10-cnn": cifar10_cnn,
    "cifar10-lenet": cifar10_lenet,
}
