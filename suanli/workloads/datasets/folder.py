"""A folder with one subfolder of pictures per class."""

from pathlib import Path

import numpy as np

from suanli.base.errors import BadInputError
from suanli.workloads.datasets.images import LabelledImages, checked, divide
from suanli.workloads.datasets.pictures import decode

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}
_TEST_NAMES = ("test", "val", "validation", "valid")
_TEST_SHARE = 0.3
_SEED = 7


def read_image_folder(folder: Path, *, side: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images from class subfolders.

    `folder/train/<class>/*` with `folder/test/<class>/*` (or `val`), or `folder/<class>/*` alone,
    of which a fixed 30 % become the test images.

    Args:
        folder: The root.
        side: Every picture is scaled on its shorter side and cut to side x side, three channels.

    Raises:
        BadInputError: No pictures are found, one is broken, or a part lacks a class.
        MissingBackendError: Pillow is absent.
    """
    train = folder / "train"
    test = next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    if train.is_dir() and test is not None:
        classes = _classes(train)
        if unknown := sorted(set(_classes(test)) - set(classes)):
            raise BadInputError(f"{test}: class {unknown[0]} is not in {train}")
        return _read(train, classes, side), _read(test, classes, side)
    everything = _read(folder, _classes(folder), side)
    held_out = int(len(everything) * _TEST_SHARE)
    if held_out < 2:
        raise BadInputError(f"{folder}: {len(everything)} pictures are too few to hold any out")
    first, second = divide(everything, (len(everything) - held_out, held_out), _SEED)
    return first, second


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise BadInputError(f"no folder {folder}")
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
    if not names:
        raise BadInputError(f"{folder} has no subfolders, one per class")
    return names


def _read(folder: Path, classes: tuple[str, ...], side: int) -> LabelledImages:
    pixels, labels = [], []
    for index, name in enumerate(classes):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in _SUFFIXES:
                pixels.append(decode(path.read_bytes(), path, crop_to=side))
                labels.append(index)
    if not pixels:
        raise BadInputError(f"{folder}: no pictures in its class folders")
    return checked(np.stack(pixels), np.asarray(labels, dtype=np.int64), classes, folder)
