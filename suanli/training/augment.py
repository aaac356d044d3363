"""Random changes of image batches that do not change their class."""

import re

import torch
from torch.nn import functional

from suanli.base.errors import BadInputError

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


def alternating_flip(images: torch.Tensor, epoch: int) -> torch.Tensor:
    """A whole set with half of its images mirrored, the other half in the next epoch.

    Which half is a fixed pattern: each image is seen both ways equally often, and no state is
    needed to go on with an epoch (arXiv 2404.00498: this learns faster than chance does).

    Args:
        images: [N, C, H, W], the same order in every epoch.
        epoch: From 0.
    """
    pattern = torch.Generator().manual_seed(_FLIP_SEED)
    first = torch.rand(len(images), generator=pattern) < 0.5
    chosen = first if epoch % 2 == 0 else ~first
    result = images.clone()
    result[chosen] = images[chosen].flip(-1)
    return result


def shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to `most` pixels, what comes in being its own reflection.

    Args:
        images: [N, C, H, W]; a whole epoch at once costs the least.
        most: In each direction.
        generator: Source of chance, on the CPU.
    """
    return _shifted(images, most, generator)


def _flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def _shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    height, width = images.shape[-2:]
    padded = functional.pad(images, (most, most, most, most), mode="reflect")
    shifts = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator)
    result = torch.empty_like(images)
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            rows = ((shifts[0] == down) & (shifts[1] == right)).nonzero().flatten()
            if len(rows):
                rows = rows.to(images.device)
                window = padded[rows, :, down : down + height, right : right + width]
                result[rows] = window
    return result
