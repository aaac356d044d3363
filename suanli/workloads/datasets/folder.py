"""A folder with one subfolder of pictures per class, decoded at once or one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from suanli.base.errors import BadInputError
from suanli.workloads.datasets.images import LabelledImages, checked
from suanli.workloads.datasets.pictures import decode

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "validation", "valid")
_TEST_SHARE = 0.3
_SEED = 7


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """Files of pictures with one class each.

    Attributes:
        labels: int64 [N], indices into `classes`.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


class PictureFolder(Dataset[tuple[torch.Tensor, int]]):
    """Pictures that are decoded when they are asked for, fp32 [3, side, side] from 0 to 1.

    Args:
        files: What `find_pictures` gave.
        side: Every picture is scaled on its shorter side and cut to side x side.
        transform: `transform(picture)` of each, such as an augmentation.
    """

    def __init__(
        self,
        files: PictureFiles,
        *,
        side: int,
        transform: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._files, self._side, self._transform = files, side, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The picture and its class.

        Raises:
            BadInputError: It cannot be decoded.
        """
        path = self._files.paths[index]
        pixels = decode(path.read_bytes(), path, crop_to=self._side)
        picture = torch.from_numpy(pixels.copy()).float().div_(255.0)
        made = picture if self._transform is None else self._transform(picture)
        return made, int(self._files.labels[index])


def find_pictures(folder: Path) -> tuple[PictureFiles, PictureFiles]:
    """Training and test pictures from class subfolders; none is decoded.

    `folder/train/<class>/*` with `folder/test/<class>/*` (or `val`), or `folder/<class>/*` alone,
    of which a fixed 30 % become the test pictures.

    Raises:
        BadInputError: No pictures are found, or a part lacks a class.
    """
    train = folder / "train"
    test = next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    if train.is_dir() and test is not None:
        classes = _classes(train)
        if unknown := sorted(set(_classes(test)) - set(classes)):
            raise BadInputError(f"{test}: class {unknown[0]} is not in {train}")
        return _found(train, classes), _found(test, classes)
    everything = _found(folder, _classes(folder))
    held_out = int(len(everything) * _TEST_SHARE)
    if held_out < 2:
        raise BadInputError(f"{folder}: {len(everything)} pictures are too few to hold any out")
    order = np.random.default_rng(_SEED).permutation(len(everything))
    cut = len(everything) - held_out
    return _some(everything, order[:cut]), _some(everything, order[cut:])


def read_image_folder(folder: Path, *, side: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images as `find_pictures` finds them, all decoded.

    Args:
        folder: The root.
        side: Every picture is scaled on its shorter side and cut to side x side, three channels.

    Raises:
        BadInputError: No pictures are found, one is broken, or a part lacks a class.
        MissingBackendError: Pillow is absent.
    """
    train, test = find_pictures(folder)
    return _decoded(train, folder, side), _decoded(test, folder, side)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise BadInputError(f"no folder {folder}")
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
    if not names:
        raise BadInputError(f"{folder} has no subfolders, one per class")
    return names


def _found(folder: Path, classes: tuple[str, ...]) -> PictureFiles:
    paths, labels = [], []
    for index, name in enumerate(classes):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in _SUFFIXES:
                paths.append(path)
                labels.append(index)
    if not paths:
        raise BadInputError(f"{folder}: no pictures in its class folders")
    found = np.asarray(labels, dtype=np.int64)
    return PictureFiles(paths=tuple(paths), labels=found, classes=classes)


def _some(files: PictureFiles, order: NDArray[np.int64]) -> PictureFiles:
    paths = tuple(files.paths[place] for place in order)
    return PictureFiles(paths=paths, labels=files.labels[order], classes=files.classes)


def _decoded(files: PictureFiles, folder: Path, side: int) -> LabelledImages:
    pixels = [decode(path.read_bytes(), path, crop_to=side) for path in files.paths]
    return checked(np.stack(pixels), files.labels, files.classes, folder)
