"""Test-time augmentation: the mean answer over several views of an image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Call = Callable[[Tensor], Tensor]


def mirrored(call: Call, images: Tensor) -> Tensor:
    """Half the answer to the images, half to their mirror images."""
    return 0.5 * call(images) + 0.5 * call(images.flip(-1))


def mirrored_and_shifted(call: Call, images: Tensor, *, shift: int = 1) -> Tensor:
    """Half the mirrored answer, half its mean over two diagonal shifts (as airbench94 has it).

    Args:
        call: [B, C, H, W] -> [B, classes].
        images: [B, C, H, W].
        shift: In pixels, up and to the left, and down and to the right.
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, (shift,) * 4, mode="reflect")
    corners = (
        padded[..., :height, :width],
        padded[..., 2 * shift :, 2 * shift :],
    )
    shifted = [mirrored(call, corner) for corner in corners]
    return 0.5 * mirrored(call, images) + 0.25 * (shifted[0] + shifted[1])


def for_the_unsure(
    call: Call, images: Tensor, views: Callable[[Call, Tensor], Tensor], *, share: float
) -> Tensor:
    """The plain answer where it is clear, that of many views where it is not.

    Args:
        call: [B, C, H, W] -> [B, classes].
        images: [B, C, H, W].
        views: Such as `mirrored_and_shifted`.
        share: Of the batch that is looked at again: those with the least lead of the first class
            over the second.
    """
    answer = call(images)
    count = round(share * len(images))
    if count:
        best = answer.float().topk(2, dim=1).values
        unsure = (best[:, 0] - best[:, 1]).topk(count, largest=False).indices
        answer = answer.clone()
        answer[unsure] = views(call, images[unsure]).to(answer.dtype)
    return answer


def called_in(model: nn.Module, *, bf16: bool) -> Call:
    """The model as a function of images, its matrix products in bf16 where asked; fp32 answers."""

    def call(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return model(images).float()  # type: ignore[no-any-return]

    return call
