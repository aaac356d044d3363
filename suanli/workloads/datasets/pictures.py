"""Encoded pictures (PNG, JPEG, ...) to bytes of fixed size."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suanli.base.errors import BadInputError
from suanli.base.lazy import need

_INSTALL = "pip install 'suanli[data]'"


def decode(
    data: bytes, origin: Path, *, size: tuple[int, int] | None = None, crop_to: int | None = None
) -> NDArray[np.uint8]:
    """Decode one picture to uint8 [3, H, W].

    Args:
        data: The encoded bytes.
        origin: The file, for messages.
        size: (H, W) that the picture must have.
        crop_to: Scale the shorter side to this and cut the middle square.

    Raises:
        BadInputError: It cannot be decoded, or has another size than asked.
        MissingBackendError: Pillow is absent.
    """
    image_module = need("PIL.Image", _INSTALL)
    try:
        with image_module.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
            if crop_to is not None:
                picture = _middle_square(picture, crop_to)
            pixels: NDArray[np.uint8] = np.asarray(picture).transpose(2, 0, 1)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        image_module.DecompressionBombError,
    ) as error:
        raise BadInputError(f"{origin.name}: a picture cannot be decoded: {error}") from None
    if size is not None and pixels.shape[1:] != size:
        raise BadInputError(f"{origin.name}: a picture of {pixels.shape[1:]} where {size} is due")
    return pixels


def _middle_square(picture: Any, side: int) -> Any:
    width, height = picture.size
    scale = side / min(width, height)
    scaled = picture.resize((max(side, round(width * scale)), max(side, round(height * scale))))
    left, top = (scaled.size[0] - side) // 2, (scaled.size[1] - side) // 2
    return scaled.crop((left, top, left + side, top + side))
