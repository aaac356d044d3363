"""CIFAR-10: the official binary batches, and parquet files with encoded images.

Binary format: records of one label byte and 3,072 pixel bytes, the planes red, green, blue, each
32x32 in rows (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version").
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from suanli.base.errors import BadInputError
from suanli.base.lazy import need
from suanli.workloads.datasets.images import LabelledImages, checked
from suanli.workloads.datasets.pictures import decode

_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_RECORD_BYTES = 1 + 3 * 32 * 32
_INSTALL = "pip install 'suanli[data]'"


def read_cifar10(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test images of CIFAR-10.

    Args:
        folder: Holds `data_batch_*.bin` and `test_batch.bin` (or a folder `cifar-10-batches-bin`
            with them), or `train-*.parquet` and `test-*.parquet` (or a folder `data` with them).

    Raises:
        BadInputError: Neither is there, or a file is broken.
        MissingBackendError: The files are parquet, and pyarrow or Pillow is absent.
    """
    for place in (folder, folder / "cifar-10-batches-bin", folder / "data"):
        train, test = sorted(place.glob("data_batch_*.bin")), place / "test_batch.bin"
        if train and test.is_file():
            return _from_batches(train), _from_batches([test])
        tables = [sorted(place.glob(f"{part}-*.parquet")) for part in ("train", "test")]
        if all(tables):
            return _from_tables(tables[0]), _from_tables(tables[1])
    raise BadInputError(
        f"no CIFAR-10 in {folder}",
        next_step="put the .bin batches or train-*.parquet and test-*.parquet there",
    )


def _from_batches(paths: list[Path]) -> LabelledImages:
    records = np.concatenate([_read_batch(path) for path in paths])
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)
    return checked(pixels, records[:, 0].astype(np.int64), _CLASSES, paths[0])


def _read_batch(path: Path) -> NDArray[np.uint8]:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) == 0 or len(data) % _RECORD_BYTES:
        raise BadInputError(
            f"{path.name} is truncated: {len(data)} bytes are not records of {_RECORD_BYTES}"
        )
    return data.reshape(-1, _RECORD_BYTES)


def _from_tables(paths: list[Path]) -> LabelledImages:
    parquet = need("pyarrow.parquet", _INSTALL)
    arrow = need("pyarrow", _INSTALL)
    encoded: list[bytes] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = parquet.read_table(path)
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise BadInputError(f"{path.name} is no readable parquet file: {reason}") from None
        image = next((name for name in ("img", "image") if name in table.column_names), None)
        if image is None or "label" not in table.column_names:
            raise BadInputError(f"{path.name} has no columns img and label")
        encoded += [row["bytes"] for row in table[image].to_pylist()]
        labels += table["label"].to_pylist()
    pixels = np.stack([decode(data, paths[0], size=(32, 32)) for data in encoded])
    return checked(pixels, np.asarray(labels, dtype=np.int64), _CLASSES, paths[0])
