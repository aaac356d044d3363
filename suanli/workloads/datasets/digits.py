"""Handwritten digits that ship inside scikit-learn: 1,797 images of 8x8 with 17 grey levels.

Source: the test part of "Optical Recognition of Handwritten Digits" (UCI, E. Alpaydin, C. Kaynak).
"""

import numpy as np
import torch
from torch.nn import functional

from suanli.base.lazy import need
from suanli.workloads.datasets.images import LabelledImages, checked, divide
from suanli.workloads.record import Data, Samples

_SIZES = (897, 180, 720)
_SEED = 1797
_MEAN, _STD = 0.305, 0.36


def read_digits() -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training (897), search (180) and acceptance (720) images, 8x8, by a fixed permutation.

    Raises:
        MissingBackendError: scikit-learn is absent.
    """
    raw = need("sklearn.datasets", "pip install scikit-learn").load_digits()
    pixels = np.rint(raw.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    classes = tuple(str(digit) for digit in range(10))
    train, search, acceptance = divide(checked(pixels, labels, classes, "digits"), _SIZES, _SEED)
    return train, search, acceptance


def digits_data(side: int = 32) -> Data:
    """The digits enlarged to [N, 1, side, side], bilinear, with mean 0 and deviation 1.

    Raises:
        MissingBackendError: scikit-learn is absent.
    """
    train, search, acceptance = read_digits()
    return Data(
        train=_enlarge(train, side),
        search=_enlarge(search, side),
        acceptance=_enlarge(acceptance, side),
        classes=train.classes,
    )


def _enlarge(images: LabelledImages, side: int) -> Samples:
    small = torch.from_numpy(images.pixels).float().div_(255.0)
    large = functional.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    return Samples(
        inputs=(large.sub_(_MEAN).div_(_STD),), labels=torch.from_numpy(images.labels.copy())
    )
