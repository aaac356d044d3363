"""Random changes of image batches that do not change their class."""

import re

import torch
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.training.native.moves import can_move, moved

_FLIP_SEED = 5


def augment(
    images: torch.Tensor, kinds: tuple[str, ...], generator: torch.Generator
) -> torch.Tensor:
    """Apply the named changes to each image on its own.

    Args:
        images: [B, C, H, W].
        kinds: "flip", or "shift" with the largest shift in pixels behind it, such as "shift4".
        generator: Source of chance, on the CPU.

    Returns:
        A new tensor of the same shape.

    Raises:
        BadInputError: An unknown kind.
    """
    for kind in kinds:
        shift = re.fullmatch(r"shift(\d+)", kind)
        if shift:
            images = _shifted(images, int(shift[1]), generator)
        elif kind == "flip":
            images = _flipped(images, generator)
        else:
            raise BadInputError(f"unknown augmentation {kind!r}", next_step="flip, shift2")
    return images


def flipped_in(epoch: int, count: int) -> torch.Tensor:
    """Which images of a set are mirrored in an epoch: half of them, the other half in the next.

    Which half is a fixed pattern: each image is seen both ways equally often, and no state is
    needed to go on with an epoch (arXiv 2404.00498: this learns faster than chance does).

    Args:
        epoch: From 0.
        count: Images in the set, in the same order in every epoch.

    Returns:
        bool [count].
    """
    pattern = torch.Generator().manual_seed(_FLIP_SEED)
    first = torch.rand(count, generator=pattern) < 0.5
    return first if epoch % 2 == 0 else ~first


def whole_epoch(
    images: torch.Tensor, epoch: int, generator: torch.Generator, *, most: int
) -> torch.Tensor:
    """A whole set, mirrored in alternation and each image moved, in one pass where possible.

    Args:
        images: [N, C, H, W].
        epoch: From 0; says which half is mirrored (`flipped_in`).
        generator: Source of the moves, on the CPU.
        most: Pixels in each direction; what comes in is the image's own reflection.

    Returns:
        A new tensor of the same shape and layout.
    """
    mirror = flipped_in(epoch, len(images)).to(images.device)
    shifts = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator)
    if can_move(images):
        return moved(images, shifts[0] - most, shifts[1] - most, mirror)
    turned = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
    return _windows(turned, most, shifts)


def _flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    shifts = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator)
    return _windows(images, most, shifts)


def _windows(images: torch.Tensor, most: int, shifts: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    padded = functional.pad(images, (most, most, most, most), mode="reflect")
    result = torch.empty_like(images)
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            rows = ((shifts[0] == down) & (shifts[1] == right)).nonzero().flatten()
            if len(rows):
                rows = rows.to(images.device)
                window = padded[rows, :, down : down + height, right : right + width]
                result[rows] = window
    return result
