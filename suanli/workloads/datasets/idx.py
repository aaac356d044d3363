"""IDX files, the format of MNIST: a big-endian header, then the values.

Format: two zero bytes, a type code, the number of dimensions, each dimension as uint32, the data
(http://yann.lecun.com/exdb/mnist/, section "the IDX file format").
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from suanli.base.errors import BadInputError
from suanli.workloads.datasets.images import LabelledImages, checked

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_BYTES = 1 << 33
_DIGITS = tuple(str(digit) for digit in range(10))


def read_idx(path: Path) -> NDArray[Any]:
    """Read an IDX file, packed with gzip or not, in the machine's byte order.

    Raises:
        BadInputError: It is absent, no IDX file, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            return _parse(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInputError(f"{path.name} is damaged: {error}") from None
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None


def _parse(file: "IO[bytes] | gzip.GzipFile", path: Path) -> NDArray[Any]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
        raise BadInputError(f"{path.name} is not an IDX file")
    dimensions = head[3]
    sizes = file.read(4 * dimensions)
    if dimensions == 0 or len(sizes) < 4 * dimensions:
        raise BadInputError(f"{path.name} ends inside its header")
    shape = struct.unpack(f">{dimensions}I", sizes)
    kind = np.dtype(_TYPES[head[2]])
    expected = math.prod(shape) * kind.itemsize
    if expected > _MOST_BYTES:
        raise BadInputError(f"{path.name} claims {expected} bytes, more than is believed")
    data = file.read(expected + 1)
    if len(data) != expected:
        more = "more" if len(data) > expected else f"{len(data)}"
        raise BadInputError(f"{path.name} should hold {expected} bytes of data and holds {more}")
    return np.frombuffer(data, dtype=kind).reshape(shape).astype(kind.newbyteorder("="))


def read_mnist(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test images of MNIST, or of a set with its file names.

    Args:
        folder: Where `train-images-idx3-ubyte[.gz]` and its three companions lie.

    Raises:
        BadInputError: A file is absent or broken.
    """
    return _pair(folder, "train"), _pair(folder, "t10k")


def _pair(folder: Path, part: str) -> LabelledImages:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.dtype != np.uint8 or labels.ndim != 1:
        raise BadInputError(f"{folder}: the {part} files hold no grey images with labels")
    return checked(images[:, None], labels.astype(np.int64), _DIGITS, folder)


def _find(folder: Path, stem: str) -> Path:
    for name in (
        stem,
        f"{stem}.gz",
        stem.replace("-idx", ".idx"),
        stem.replace("-idx", ".idx") + ".gz",
    ):
        if (folder / name).is_file():
            return folder / name
    raise BadInputError(f"no {stem}[.gz] in {folder}", next_step="put the four MNIST files there")
