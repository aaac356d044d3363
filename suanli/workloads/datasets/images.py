"""Labelled images as stored, and how they become the three parts that a workload needs."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from suanli.base.errors import BadInputError
from suanli.workloads.record import Data, Samples

_SEARCH_SHARE = 0.2
_SPLIT_SEED = 20_240_601


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images with one class each.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], indices into `classes`.
        classes: Names of the classes.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: NDArray[np.int64]) -> "LabelledImages":
        """The images at these positions."""
        return LabelledImages(
            pixels=self.pixels[positions], labels=self.labels[positions], classes=self.classes
        )


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How bytes become a model's input: `(byte / 255 - mean) / std`, per channel or for all."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def apply(self, images: LabelledImages) -> Samples:
        """fp32 [N, C, H, W] with labels [N]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels)).float().div_(255.0)
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return Samples(
            inputs=(pixels.sub_(mean).div_(std),), labels=torch.from_numpy(images.labels)
        )


def checked(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    origin: Path | str,
) -> LabelledImages:
    """Put images and labels together.

    Raises:
        BadInputError: Their counts differ, there are none, or a label names no class.
    """
    if len(pixels) != len(labels):
        raise BadInputError(f"{origin}: {len(pixels)} images but {len(labels)} labels")
    if len(labels) == 0:
        raise BadInputError(f"{origin}: no images in it")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        wrong = low if low < 0 else high
        raise BadInputError(
            f"{origin}: label {wrong} is out of range, classes are 0 to {len(classes) - 1}"
        )
    return LabelledImages(pixels=pixels, labels=labels.astype(np.int64), classes=classes)


def split(
    train: LabelledImages, test: LabelledImages, *, scaling: Scaling, search: int | None = None
) -> Data:
    """Training images, and the test images in a search and an acceptance part.

    Args:
        train: What weights are fitted on.
        test: Images that are not in `train`; a fixed permutation divides them.
        scaling: How bytes become inputs.
        search: Size of the search part; None is a fifth.

    Raises:
        BadInputError: Too few test images for two parts, or the two sets have other classes.
    """
    if train.classes != test.classes:
        raise BadInputError("the training and the test images do not have the same classes")
    searched, accepted = halves(len(test), search)
    return Data(
        train=scaling.apply(train),
        search=scaling.apply(test.take(searched)),
        acceptance=scaling.apply(test.take(accepted)),
        classes=train.classes,
    )


def divide(images: LabelledImages, sizes: tuple[int, ...], seed: int) -> list[LabelledImages]:
    """Disjoint parts of these sizes, by a permutation that depends on `seed` alone."""
    order = np.random.default_rng(seed).permutation(len(images))
    edges = np.cumsum((0, *sizes))
    return [images.take(order[a:b]) for a, b in pairwise(edges)]


def halves(tests: int, search: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the search and of the acceptance samples among so many test samples.

    Raises:
        BadInputError: There are too few for two parts.
    """
    count = int(tests * _SEARCH_SHARE) if search is None else search
    if not 0 < count < tests:
        raise BadInputError(f"{tests} test images are too few for a search and an acceptance part")
    order = np.random.default_rng(_SPLIT_SEED).permutation(tests)
    return order[:count], order[count:]
