"""Filters for images, a diffusion stencil, and random crops with flips."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from suanli.kernels.declaration import (
    Config,
    Declaration,
    Inputs,
    KernelWork,
    Outputs,
    Sizes,
    Source,
)
from suanli.kernels.launching import ceil_div, empty, empty_like, launch, power_of_two

WorkOf = Callable[[Sizes, int], KernelWork]

# Parts that one image's sum is cut into at most.
_PARTS = 64


def _tiles(planes: int, height: int, width: int, config: Config) -> tuple[int]:
    return (planes * ceil_div(height, config["block_h"]) * ceil_div(width, config["block_w"]),)


def _options(config: Config) -> dict[str, int]:
    return {
        **{"BLOCK_H": config["block_h"], "BLOCK_W": config["block_w"]},
        **{"num_warps": config["num_warps"], "num_stages": 1},
    }


def _denoise(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import images as code

    image = inputs["image"].contiguous()
    out = empty_like(image)
    n, channels, height, width = image.shape
    launch(
        code.denoise,
        _tiles(n * channels, height, width, config),
        *(image, out, height, width),
        *(0.5 / inputs["sigma_space"] ** 2, 0.5 / inputs["sigma_range"] ** 2),
        RADIUS=inputs["radius"],
        **_options(config),
    )
    return (out,)


def _windows(image: torch.Tensor, radius: int) -> torch.Tensor:
    """All shifts of an image with its border repeated: [taps, N, C, H, W]."""
    height, width = image.shape[2:]
    side = 2 * radius + 1
    padded = functional.pad(image, [radius] * 4, mode="replicate")
    return torch.stack(
        [padded[:, :, i : i + height, j : j + width] for i in range(side) for j in range(side)]
    )


def _denoise_reference(inputs: Inputs) -> Outputs:
    image, radius = inputs["image"], inputs["radius"]
    values = _windows(image, radius)
    line = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float64)
    far = (line[:, None] ** 2 + line[None, :] ** 2).flatten().to(image.dtype)
    exponent = -far[:, None, None, None, None] * (0.5 / inputs["sigma_space"] ** 2)
    exponent = exponent - (values - image).square() * (0.5 / inputs["sigma_range"] ** 2)
    weights = exponent.exp()
    return ((weights * values).sum(0) / weights.sum(0),)


def _sharpen(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import images as code

    image = inputs["image"].contiguous()
    out = empty_like(image)
    n, channels, height, width = image.shape
    launch(
        code.sharpen,
        _tiles(n * channels, height, width, config),
        *(image, out, height, width, inputs["amount"], 0.0, 1.0),
        **_options(config),
    )
    return (out,)


def _sharpen_reference(inputs: Inputs) -> Outputs:
    image = inputs["image"]
    line = torch.tensor([1.0, 2.0, 1.0], device=image.device, dtype=image.dtype) / 4
    kernel = (line[:, None] * line[None, :]).flatten()
    blurred = (_windows(image, 1) * kernel[:, None, None, None, None]).sum(0)
    return ((image + inputs["amount"] * (image - blurred)).clamp(0, 1),)


def _contrast(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import images as code

    image = inputs["image"].contiguous()
    n, pixels = image.shape[0], image[0].numel()
    block = config["block"]
    per_part = ceil_div(ceil_div(pixels, _PARTS), block) * block
    parts = ceil_div(pixels, per_part)
    sums = empty((n, parts), torch.float32, image.device)
    out = empty_like(image)
    options = {"BLOCK": block, "num_warps": config["num_warps"], "num_stages": 1}
    launch(code.plane_sums, (n, parts), image, sums, pixels, parts, per_part, **options)
    launch(
        code.contrast,
        (n, ceil_div(pixels, block)),
        *(image, sums, out, pixels, parts, inputs["factor"], 0.0, 1.0),
        PARTS=power_of_two(parts),
        **options,
    )
    return (out,)


def _contrast_reference(inputs: Inputs) -> Outputs:
    image = inputs["image"]
    mean = image.mean((1, 2, 3), keepdim=True)
    return ((mean + inputs["factor"] * (image - mean)).clamp(0, 1),)


def _diffuse(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import images as code

    grid = inputs["grid"].contiguous()
    planes, height, width = grid.shape
    pair = (empty_like(grid), empty_like(grid) if inputs["steps"] > 1 else grid)
    for step in range(inputs["steps"]):
        out = pair[step % 2]
        launch(
            code.diffuse,
            _tiles(planes, height, width, config),
            *(grid, out, height, width, inputs["rate"]),
            **_options(config),
        )
        grid = out
    return (grid,)


def _diffuse_reference(inputs: Inputs) -> Outputs:
    grid = inputs["grid"]
    for _ in range(inputs["steps"]):
        new = grid.clone()
        sides = grid[:, :-2, 1:-1] + grid[:, 2:, 1:-1] + grid[:, 1:-1, :-2] + grid[:, 1:-1, 2:]
        middle = grid[:, 1:-1, 1:-1]
        new[:, 1:-1, 1:-1] = middle + inputs["rate"] * (sides - 4 * middle)
        grid = new
    return (grid,)


def _crop(inputs: Inputs, config: Config) -> Outputs:
    from suanli.kernels.triton_code import images as code

    image = inputs["image"].contiguous()
    n, channels, height, width = image.shape
    out_height, out_width = inputs["size"]
    out = empty((n, channels, out_height, out_width), image.dtype, image.device)
    launch(
        code.crop_flip,
        _tiles(n * channels, out_height, out_width, config),
        *(image, inputs["offsets"].contiguous(), inputs["flips"].contiguous(), out),
        *(channels, height, width, out_height, out_width),
        **_options(config),
    )
    return (out,)


def _crop_reference(inputs: Inputs) -> Outputs:
    """By gathering, without a loop over the images."""
    image, (out_height, out_width) = inputs["image"], inputs["size"]
    n, channels, height, width = image.shape
    y = inputs["offsets"][:, :1] + torch.arange(out_height, device=image.device)
    line = torch.arange(out_width, device=image.device)
    flipped = inputs["flips"].bool()[:, None]
    x = inputs["offsets"][:, 1:] + torch.where(flipped, out_width - 1 - line, line)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    place = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    place = place.reshape(n, 1, -1).expand(-1, channels, -1).long()
    taken = image.reshape(n, channels, -1).gather(2, place)
    taken = taken.reshape(n, channels, out_height, out_width)
    return (torch.where(inside[:, None], taken, torch.zeros_like(taken)),)


def _image(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    shape = (sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])
    return Source(device, seed).uniform(*shape, dtype=dtype)


def _crop_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make, (batch, border) = Source(device, seed + 1), (sizes["batch"], 4)
    return {
        "image": _image(sizes, dtype, device, seed),
        "offsets": make.integers(batch, 2, low=-border, high=border + 1, dtype=torch.int32),
        "flips": make.integers(batch, low=0, high=2, dtype=torch.int8),
        "size": (sizes["out_height"], sizes["out_width"]),
    }


def _grid_inputs(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    make = Source(device, seed)
    grid = make.uniform(sizes["planes"], sizes["height"], sizes["width"], dtype=dtype)
    return {"grid": grid, "rate": 0.2, "steps": sizes["steps"]}


def _image_sizes(inputs: Inputs) -> dict[str, int]:
    names = ("batch", "channels", "height", "width")
    return dict(zip(names, inputs["image"].shape, strict=True))


def _grid_sizes(inputs: Inputs) -> Sizes:
    shape = dict(zip(("planes", "height", "width"), inputs["grid"].shape, strict=True))
    return {**shape, "steps": inputs["steps"]}


def _crop_sizes(inputs: Inputs) -> Sizes:
    height, width = inputs["size"]
    return {**_image_sizes(inputs), "out_height": height, "out_width": width}


def _pixels(sizes: Sizes) -> int:
    return sizes["batch"] * sizes["channels"] * sizes["height"] * sizes["width"]


def _filter_work(per_pixel: int, passes: int = 1) -> WorkOf:
    def work(sizes: Sizes, item: int) -> KernelWork:
        n = _pixels(sizes)
        return KernelWork(flops=per_pixel * n, bytes_read=passes * n * item, bytes_written=n * item)

    return work


def _grid_work(sizes: Sizes, item: int) -> KernelWork:
    n = sizes["planes"] * sizes["height"] * sizes["width"] * sizes["steps"]
    return KernelWork(flops=6 * n, bytes_read=n * item, bytes_written=n * item)


def _crop_work(sizes: Sizes, item: int) -> KernelWork:
    planes = sizes["batch"] * sizes["channels"]
    n = planes * sizes["out_height"] * sizes["out_width"]
    return KernelWork(flops=0, bytes_read=n * item, bytes_written=n * item)


def _legal(config: Config, sizes: Sizes) -> bool:
    tile, threads = config["block_h"] * config["block_w"], 32 * config["num_warps"]
    return threads <= tile <= 16 * threads


def _line_legal(config: Config, sizes: Sizes) -> bool:
    threads = 32 * config["num_warps"]
    return threads <= config["block"] <= 32 * threads


def _default(sizes: Sizes) -> Config:
    return {"block_h": 8, "block_w": 64, "num_warps": 4}


_CHECKED: tuple[Sizes, ...] = (
    {"batch": 1, "channels": 1, "height": 1, "width": 3},
    {"batch": 2, "channels": 2, "height": 11, "width": 70},
)
_TIMED: tuple[Sizes, ...] = (
    {"batch": 64, "channels": 3, "height": 512, "width": 512},
    {"batch": 8, "channels": 3, "height": 2160, "width": 3840},
)
_TILES: Mapping[str, tuple[int, ...]] = {
    "block_h": (1, 2, 4, 8, 16, 32),
    "block_w": (32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
}
_SHARED: Mapping[str, Any] = {
    "code": ("images",),
    "files": (Path(__file__),),
    "tunables": _TILES,
    "default": _default,
    "legal": _legal,
}
DENOISE = Declaration(
    name="denoise",
    title="bilateral filter",
    inputs=lambda sizes, dtype, device, seed: {
        "image": _image(sizes, dtype, device, seed),
        **{"radius": 2, "sigma_space": 1.5, "sigma_range": 0.2},
    },
    sizes=_image_sizes,
    run=_denoise,
    reference=_denoise_reference,
    work=_filter_work(25 * 8),
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    depth=lambda sizes: 50,
    **_SHARED,
)
SHARPEN = Declaration(
    name="sharpen",
    title="unsharp mask",
    inputs=lambda sizes, dtype, device, seed: {
        "image": _image(sizes, dtype, device, seed),
        "amount": 0.7,
    },
    sizes=_image_sizes,
    run=_sharpen,
    reference=_sharpen_reference,
    work=_filter_work(22),
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    depth=lambda sizes: 9,
    **_SHARED,
)
CONTRAST = Declaration(
    name="contrast",
    title="contrast about the image's mean",
    inputs=lambda sizes, dtype, device, seed: {
        "image": _image(sizes, dtype, device, seed),
        "factor": 1.4,
    },
    sizes=_image_sizes,
    run=_contrast,
    reference=_contrast_reference,
    work=_filter_work(5, passes=2),
    check_sizes=_CHECKED,
    bench_sizes=_TIMED,
    depth=lambda sizes: sizes["channels"] * sizes["height"] * sizes["width"],
    **{
        **_SHARED,
        "tunables": {"block": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)},
        "default": lambda sizes: {"block": 2048, "num_warps": 4},
        "legal": _line_legal,
    },
)
STENCIL = Declaration(
    name="stencil",
    title="five-point diffusion",
    inputs=_grid_inputs,
    sizes=_grid_sizes,
    run=_diffuse,
    reference=_diffuse_reference,
    work=_grid_work,
    check_sizes=(
        {"planes": 1, "height": 2, "width": 3, "steps": 1},
        {"planes": 2, "height": 19, "width": 67, "steps": 3},
    ),
    bench_sizes=({"planes": 1, "height": 8192, "width": 8192, "steps": 4},),
    depth=lambda sizes: 6 * sizes["steps"],
    roundings=2,
    **_SHARED,
)
CROP = Declaration(
    name="crop_flip",
    title="batched crop and flip",
    inputs=_crop_inputs,
    sizes=_crop_sizes,
    run=_crop,
    reference=_crop_reference,
    work=_crop_work,
    check_sizes=(
        {"batch": 3, "channels": 3, "height": 9, "width": 11, "out_height": 9, "out_width": 11},
        {"batch": 5, "channels": 1, "height": 20, "width": 70, "out_height": 16, "out_width": 66},
    ),
    bench_sizes=(
        {"batch": 512, "channels": 3, "height": 32, "width": 32, "out_height": 32, "out_width": 32},
        {
            **{"batch": 128, "channels": 3, "height": 256, "width": 256},
            **{"out_height": 224, "out_width": 224},
        },
    ),
    **_SHARED,
)
