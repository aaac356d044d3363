"""Labelled pictures for an imported classifier, from whatever data set lies in a folder."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from suanli.base.errors import BadInputError
from suanli.workloads.datasets import (
    PictureFolder,
    Scaling,
    find_pictures,
    read_cifar10,
    read_mnist,
    split,
)
from suanli.workloads.datasets.images import halves
from suanli.workloads.record import Data, Samples, Workload
from suanli.workloads.stream import Stream

_CIFAR10 = ("data_batch_*.bin", "train-*.parquet", "cifar-10-batches-bin", "data/train-*.parquet")


def with_labelled_data(workload: Workload, folder: Path) -> Workload:
    """Give a classifier of pictures the data of a folder.

    The folder holds MNIST's IDX files, CIFAR-10, or one subfolder of pictures per class. Bytes
    become 0 to 1; a model that wants another scaling needs a Workload of its own.

    Args:
        workload: Takes one input, [B, C, H, W] or [B, H, W, C].
        folder: The data.

    Raises:
        BadInputError: The model does not take pictures, or there is no such folder.
    """
    inputs = workload.make_inputs(2)
    shape = tuple(inputs.args[0].shape[1:]) if len(inputs.args) == 1 else ()
    if inputs.kwargs or len(shape) != 3:
        raise BadInputError(
            f"{workload.name} does not take one picture, so --data cannot feed it",
            next_step="make a suanli.Workload with data in a Python file",
        )
    if not folder.is_dir():
        raise BadInputError(f"no folder {folder}")
    note = "; ".join(part for part in (workload.note, "pictures are scaled to 0 to 1") if part)
    return replace(workload, data=partial(_load, folder, shape), metric="accuracy", note=note)


def _load(folder: Path, shape: tuple[int, int, int]) -> Data:
    last = shape[2] in (1, 3) and shape[0] not in (1, 3)
    channels, height, width = (shape[2], *shape[:2]) if last else shape
    if not _known(folder):
        return _pictures(folder, height, (channels, height, width), last=last)
    train, test = read_mnist(folder) if any(folder.glob("train-images*")) else read_cifar10(folder)
    found = train.pixels.shape[1:]
    if found != (channels, height, width):
        raise BadInputError(f"{folder} has pictures of {found}, the model takes {shape}")
    data = split(train, test, scaling=Scaling())
    if not last:
        return data
    return replace(
        data,
        train=_channels_last(data.train),
        search=_channels_last(data.search),
        acceptance=_channels_last(data.acceptance),
    )


def _known(folder: Path) -> bool:
    """Whether it holds a data set of a known form, and not pictures in folders."""
    return any(any(folder.glob(pattern)) for pattern in ("train-images*", *_CIFAR10))


def _pictures(folder: Path, side: int, shape: tuple[int, int, int], *, last: bool) -> Data:
    """Pictures that are decoded when they are asked for, so that they need not fit into memory."""
    if shape != (3, side, side):
        raise BadInputError(f"{folder} has pictures of {(3, side, side)}, the model takes {shape}")
    turned = _turned if last else None
    files = find_pictures(folder)
    train, test = (Stream(PictureFolder(f, side=side, transform=turned)) for f in files)
    searched, accepted = map(torch.from_numpy, halves(len(test)))
    return Data(
        train=train,
        search=test.part(searched),
        acceptance=test.part(accepted),
        classes=files[0].classes,
    )


def _turned(picture: torch.Tensor) -> torch.Tensor:
    """[3, H, W] as [H, W, 3]."""
    return picture.permute(1, 2, 0)


def _channels_last(samples: Samples) -> Samples:
    return replace(samples, inputs=(samples.inputs[0].permute(0, 2, 3, 1).contiguous(),))
