"""The articles' five programs with the hyper-parameters they are written with."""

from functools import partial
from pathlib import Path

from torch import nn
from torch.nn import functional

from suanli.workloads.builtins.sources import NEEDS_DATA, cifar10, mnist
from suanli.workloads.datasets import Scaling
from suanli.workloads.models.articles import NETWORKS, cross_entropy_of_probabilities
from suanli.workloads.record import Inputs, TrainingSettings, Workload
from suanli.workloads.seeding import pictures, random_weights

_HALF = Scaling(mean=(0.5,), std=(0.5,))


def mnist_cnn(root: Path | None) -> Workload:
    """Three convolutions on MNIST, ending in a softmax."""
    return Workload(
        name="mnist-cnn",
        make_model=partial(_model, "mnist-cnn"),
        make_inputs=partial(_inputs, 1, 28),
        data=mnist(root),
        metric="accuracy",
        loss=cross_entropy_of_probabilities,
        target=0.985,
        max_batch=1024,
        training=TrainingSettings(optimizer="adam", lr=0.001, batch=128, epochs=15),
        note=_note(root, "claimed: 98.50 %, 10 s an epoch"),
    )


def mnist_cnn_small(root: Path | None) -> Workload:
    """One convolution on MNIST."""
    return Workload(
        name="mnist-cnn-small",
        make_model=partial(_model, "mnist-cnn-small"),
        make_inputs=partial(_inputs, 1, 28),
        data=mnist(root),
        metric="accuracy",
        loss=functional.cross_entropy,
        target=0.98,
        max_batch=1024,
        training=TrainingSettings(
            optimizer="adam", lr=0.001, batch=32, epochs=5, validation_split=0.2
        ),
        note=_note(root, "claimed: 98.51 %, 5 s an epoch"),
    )


def mnist_mlp(root: Path | None) -> Workload:
    """784-256-128-10 on MNIST."""
    return Workload(
        name="mnist-mlp",
        make_model=partial(_model, "mnist-mlp"),
        make_inputs=partial(_inputs, 1, 28),
        data=mnist(root),
        metric="accuracy",
        loss=functional.cross_entropy,
        target=0.97,
        max_batch=1024,
        training=TrainingSettings(optimizer="sgd", lr=0.01, momentum=0.9, batch=64, epochs=10),
        note=_note(root, ""),
    )


def cifar10_cnn(root: Path | None) -> Workload:
    """Three convolutions on CIFAR-10."""
    return Workload(
        name="cifar10-cnn",
        make_model=partial(_model, "cifar10-cnn"),
        make_inputs=partial(_inputs, 3, 32),
        data=cifar10(root),
        metric="accuracy",
        loss=functional.cross_entropy,
        target=0.65,
        max_batch=1024,
        training=TrainingSettings(optimizer="adam", lr=0.001, batch=32, epochs=10),
        note=_note(root, "claimed: 90.83 %, which this network cannot reach"),
    )


def cifar10_lenet(root: Path | None) -> Workload:
    """LeNet on CIFAR-10, inputs from -1 to 1."""
    return Workload(
        name="cifar10-lenet",
        make_model=partial(_model, "cifar10-lenet"),
        make_inputs=partial(_inputs, 3, 32),
        data=cifar10(root, _HALF),
        metric="accuracy",
        loss=functional.cross_entropy,
        target=0.5,
        max_batch=1024,
        training=TrainingSettings(
            optimizer="sgd", lr=0.001, momentum=0.9, batch=4, epochs=2, loader_workers=2
        ),
        note=_note(root, "claimed: 91.7 %, which this network cannot reach"),
    )


def _model(name: str) -> nn.Module:
    return random_weights(NETWORKS[name])


def _inputs(channels: int, side: int, batch: int) -> Inputs:
    return Inputs(args=(pictures(batch, channels, side),))


def _note(root: Path | None, claim: str) -> str:
    return "; ".join(part for part in (claim, "" if root else NEEDS_DATA) if part)
