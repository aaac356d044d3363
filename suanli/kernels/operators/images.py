"""Image filters, the stencil and crops as operators. No gradients: they stand before a model."""

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Declaration, Inputs
from suanli.kernels.shipped.images import CONTRAST, CROP, DENOISE, SHARPEN, STENCIL


def _call(kernel: Declaration, inputs: Inputs, tensor: torch.Tensor) -> torch.Tensor:
    given = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    if usable(*given) and tensor.numel():
        return kernel.run(inputs, choose(kernel, inputs, tensor))[0]
    made = kernel.elsewhere(inputs)[0].contiguous()
    return made.clone() if made.data_ptr() == tensor.data_ptr() else made


@torch.library.custom_op("suanli::denoise", mutates_args=())
def _denoise(
    image: torch.Tensor, radius: int, sigma_space: float, sigma_range: float
) -> torch.Tensor:
    inputs: Inputs = {
        **{"image": image, "radius": radius},
        **{"sigma_space": sigma_space, "sigma_range": sigma_range},
    }
    return _call(DENOISE, inputs, image)


@torch.library.custom_op("suanli::sharpen", mutates_args=())
def _sharpen(image: torch.Tensor, amount: float) -> torch.Tensor:
    return _call(SHARPEN, {"image": image, "amount": amount}, image)


@torch.library.custom_op("suanli::contrast", mutates_args=())
def _contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    return _call(CONTRAST, {"image": image, "factor": factor}, image)


@torch.library.custom_op("suanli::diffuse", mutates_args=())
def _diffuse(grid: torch.Tensor, rate: float, steps: int) -> torch.Tensor:
    return _call(STENCIL, {"grid": grid, "rate": rate, "steps": steps}, grid)


@torch.library.custom_op("suanli::crop_flip", mutates_args=())
def _crop_flip(
    image: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, size: list[int]
) -> torch.Tensor:
    inputs: Inputs = {"image": image, "offsets": offsets, "flips": flips, "size": tuple(size)}
    return _call(CROP, inputs, image)


def _same(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


for _operator in (_denoise, _sharpen, _contrast, _diffuse):
    _operator.register_fake(_same)


@_crop_flip.register_fake
def _crop_fake(
    image: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, size: list[int]
) -> torch.Tensor:
    return image.new_empty(image.shape[0], image.shape[1], size[0], size[1])


def _four(image: torch.Tensor) -> None:
    if image.dim() != 4:
        raise BadInputError(f"images are [N, C, H, W], not {tuple(image.shape)}")


def denoise(
    image: torch.Tensor, *, radius: int = 2, sigma_space: float = 1.5, sigma_range: float = 0.1
) -> torch.Tensor:
    """Bilateral filter (Tomasi and Manduchi, 1998) of each channel; the border is repeated.

    Args:
        image: [N, C, H, W] floating point.
        radius: Pixels to each side, 1 to 5.
        sigma_space: Deviation in pixels.
        sigma_range: Deviation in the image's unit.

    Raises:
        BadInputError: A figure is out of range.
    """
    _four(image)
    if not 1 <= radius <= 5 or sigma_space <= 0 or sigma_range <= 0:
        raise BadInputError("denoise takes a radius of 1 to 5 and deviations above 0")
    made: torch.Tensor = _denoise(image, radius, sigma_space, sigma_range)
    return made


def sharpen(image: torch.Tensor, *, amount: float = 0.5) -> torch.Tensor:
    """Unsharp mask with the 3x3 binomial blur, for images [N, C, H, W] of values 0 to 1."""
    _four(image)
    made: torch.Tensor = _sharpen(image, amount)
    return made


def contrast(image: torch.Tensor, *, factor: float) -> torch.Tensor:
    """Stretch values of 0 to 1 about each image's mean by `factor`, and clamp them."""
    _four(image)
    made: torch.Tensor = _contrast(image, factor)
    return made


def diffuse(grid: torch.Tensor, *, rate: float, steps: int = 1) -> torch.Tensor:
    """Explicit steps of the heat equation with the five-point stencil; the border is fixed.

    Args:
        grid: [planes, H, W] floating point.
        rate: Diffusivity times the time step over the squared mesh width; stable up to 0.25.
        steps: How many steps.

    Raises:
        BadInputError: The grid has another rank, or there is no step.
    """
    if grid.dim() != 3 or steps < 1:
        raise BadInputError("diffuse takes a grid [planes, H, W] and at least one step")
    made: torch.Tensor = _diffuse(grid, rate, steps)
    return made


def crop_flip(
    image: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """A window of each image at its own offset, mirrored left to right where asked.

    Args:
        image: [N, C, H, W] of any dtype.
        offsets: [N, 2] whole numbers: top and left; what lies outside the image is 0.
        flips: [N], not 0 where the window is mirrored.
        size: Height and width of the windows.

    Raises:
        BadInputError: There is not one offset and flip per image.
    """
    _four(image)
    if offsets.shape != (image.shape[0], 2) or flips.shape != (image.shape[0],):
        raise BadInputError("crop_flip needs offsets [N, 2] and flips [N]")
    made: torch.Tensor = _crop_flip(image, offsets.int(), flips.to(torch.int8), list(size))
    return made


def random_crop_flip(
    image: torch.Tensor,
    *,
    padding: int = 4,
    size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Each image's own random window and flip, as training on small images wants them.

    Args:
        image: [N, C, H, W].
        padding: Zeros around the image before the window is taken.
        size: Height and width of the window; by default the image's.
        generator: Where randomness comes from, on the image's device.

    Raises:
        BadInputError: The window is larger than the padded image.
    """
    _four(image)
    (n, _, height, width), where = image.shape, image.device
    out_height, out_width = size or (height, width)
    room = (height + 2 * padding - out_height, width + 2 * padding - out_width)
    if min(room) < 0:
        raise BadInputError(f"no window {out_height}x{out_width} in a padded {height}x{width}")
    drawn = [torch.randint(0, r + 1, (n,), device=where, generator=generator) for r in room]
    flips = torch.randint(0, 2, (n,), device=where, generator=generator)
    offsets = torch.stack(drawn, dim=1) - padding
    return crop_flip(image, offsets, flips, (out_height, out_width))
