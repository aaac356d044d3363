"""Data sets of the built-in workloads under one root folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from suanli.base.errors import BadInputError
from suanli.workloads.datasets import Scaling, read_cifar10, read_mnist, split
from suanli.workloads.record import Data

NEEDS_DATA = "give the folder of the data sets with --data or SUANLI_DATA"


def mnist(root: Path | None, scaling: Scaling | None = None) -> Callable[[], Data] | None:
    """A loader of MNIST from `root/mnist`, or from `root` itself; None without a root."""
    return partial(_mnist, root, scaling or Scaling()) if root else None


def cifar10(root: Path | None, scaling: Scaling | None = None) -> Callable[[], Data] | None:
    """A loader of CIFAR-10 from `root/cifar10`, or from `root` itself; None without a root."""
    return partial(_cifar10, root, scaling or Scaling()) if root else None


def _mnist(root: Path, scaling: Scaling) -> Data:
    train, test = read_mnist(_place(root, "mnist"))
    return split(train, test, scaling=scaling)


def _cifar10(root: Path, scaling: Scaling) -> Data:
    train, test = read_cifar10(_place(root, "cifar10"))
    return split(train, test, scaling=scaling)


def _place(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise BadInputError(f"no folder {root}", next_step=NEEDS_DATA)
    return root / name if (root / name).is_dir() else root
