"""Random changes of image batches that do not change their class."""

import re

import torch
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.training.native.moves import can_move, moved

_FLIP_SEED = 5
_CUT_AT_ONCE = 2048  # images: their mask stays in the cache


def augment(
    images: torch.Tensor, kinds: tuple[str, ...], generator: torch.Generator
) -> torch.Tensor:
    """Apply the named changes to each image on its own.

    Args:
        images: [B, C, H, W].
        kinds: "flip", "shift" with the largest shift in pixels behind it, such as "shift4", or
            "cutout" with the side of the square, such as "cutout8".
        generator: Source of chance, on the CPU.

    Returns:
        A new tensor of the same shape.

    Raises:
        BadInputError: An unknown kind, or a shift that is not shorter than the images' sides.
    """
    for kind in kinds:
        sized = re.fullmatch(r"(shift|cutout)(\d+)", kind)
        if kind == "flip":
            images = _flipped(images, generator)
        elif sized is None:
            raise BadInputError(f"unknown augmentation {kind!r}", next_step="flip, shift2, cutout8")
        elif sized[1] == "shift":
            images = _shifted(images, int(sized[2]), generator)
        else:
            images = cut_out(images.clone(), int(sized[2]), generator)
    return images


def cut_out(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Set a square of each image to 0, in place (Cutout, arXiv 1708.04552).

    Args:
        images: [N, C, H, W], scaled so that 0 is the mean of the set.
        side: Of the square, in pixels; what of it lies outside of the image is lost.
        generator: Source of the centres, which may be any pixel, on the CPU.

    Returns:
        The same tensor.
    """
    height, width = images.shape[-2:]
    rows = _covered(height, side, len(images), generator).to(images.device)
    columns = _covered(width, side, len(images), generator).to(images.device)
    for start in range(0, len(images), _CUT_AT_ONCE):
        part = slice(start, start + _CUT_AT_ONCE)
        squares = rows[part, None, :, None] & columns[part, None, None, :]
        images[part].masked_fill_(squares, 0)
    return images


def _covered(length: int, side: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Which of `length` places lie in `side` places about a random one: bool [count, length]."""
    first = torch.randint(length, (count, 1), generator=generator) - side // 2
    places = torch.arange(length)
    return (places >= first) & (places < first + side)


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

    Raises:
        BadInputError: The moves are not shorter than the images' sides.
    """
    _check_reflection(images, most)
    mirror = flipped_in(epoch, len(images)).to(images.device)
    shifts = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator)
    if can_move(images):
        return moved(images, shifts[0] - most, shifts[1] - most, mirror)
    turned = torch.where(mirror.view(-1, 1, 1, 1), images.flip(-1), images)
    return _windows(turned, most, shifts)


def _flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _check_reflection(images: torch.Tensor, most: int) -> None:
    """An image reflects as many lines as it has beside the edge, and no more."""
    height, width = images.shape[-2:]
    if not 0 <= most < min(height, width):
        raise BadInputError(
            f"images of {height}x{width} pixels cannot be shifted by up to {most}",
            next_step=f"{min(height, width) - 1} at most: what comes in is their own reflection",
        )


def _shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    _check_reflection(images, most)
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
