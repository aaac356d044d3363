"""`suanli::conv2d`: a convolution in bf16 whose weights and their gradient are fp32.

Forward and the gradient of the images are the library's (oneDNN); the gradient of the weights is
ours where there are tile registers. It is never rounded to bf16 on its way to the optimiser.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suanli.base.compiler import CompilerError
from suanli.base.errors import MissingBackendError
from suanli.training.native.library import address, kernels, need

SOURCE = Path(__file__).with_name("weights.c")
_CHUNK_PIXELS = 512  # packed at a time: what stays in a core's second-level cache with 256 channels
_MOST_TAPS = 49
_LEAST_INPUTS = 16  # of a tile; with fewer, what is packed is mostly zeros
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Weights(ctypes.Structure):
    """The argument of `suanli_weights`."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "height", "width", "inputs", "outputs")),
        *((name, _INT) for name in ("kernel", "threads")),
        ("inset", _LONG),
        *(
            (name, _POINTER)
            for name in ("x", "g", "result", "pairs", "turned", "sums", "places", "zeros")
        ),
        *((name, _LONG) for name in ("chunk_images", "splits")),
    )


@cache
def tile_library() -> ctypes.CDLL | None:
    """The tile kernel, or None where processor, system or compiler have no tile registers."""
    functions = {"suanli_weights": (Weights,), "suanli_weights_sizes": (Weights, _LONG)}
    try:
        tiles = kernels(SOURCE, functions)
    except (MissingBackendError, CompilerError):
        return None
    return tiles if tiles.suanli_tiles() else None


def weight_gradient(gradient: Tensor, images: Tensor, kernel: int, padding: int) -> Tensor:
    """Gradient of the weights of a convolution of stride 1, in fp32.

    Args:
        gradient: bf16 [B, O, H', W'], channels last.
        images: bf16 [B, I, H, W], channels last.
        kernel: Height and width of the kernel, an odd number.
        padding: On each side, at most half of the kernel.

    Returns:
        fp32 [O, I, kernel, kernel], channels last.

    Raises:
        RuntimeError: There are no tile registers; ask `tile_library` first.
        ValueError: The shapes do not belong together, or the kernel is none that it takes.
    """
    tiles = tile_library()
    if tiles is None:
        raise RuntimeError("no tile registers")
    gradient, images = _rows(gradient), _rows(images)
    batch, inputs, height, width = images.shape
    outputs = gradient.shape[1]
    sides = (height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1)
    need(
        kernel % 2 == 1 and kernel * kernel <= _MOST_TAPS and 0 <= padding <= kernel // 2,
        f"odd kernels of at most {_MOST_TAPS} places, and a padding of at most half of them",
    )
    need(
        gradient.shape == (batch, outputs, *sides) and min(inputs, outputs, *sides) > 0,
        "a gradient of the result's shape",
    )
    threads = torch.get_num_threads()
    per_image = (height + kernel // 2) * (width + kernel // 2)
    result = torch.empty(
        (outputs, inputs, kernel, kernel),
        dtype=torch.float32,
        memory_format=torch.channels_last,
    )
    record = Weights(
        images=batch,
        height=height,
        width=width,
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        threads=threads,
        inset=kernel // 2 - padding,
        x=address(images),
        g=address(gradient),
        result=address(result),
        chunk_images=max(1, _CHUNK_PIXELS // per_image),
        splits=min(threads, batch),
    )
    sizes = (_LONG * 4)()
    tiles.suanli_weights_sizes(ctypes.byref(record), sizes)
    pairs, turned = (torch.empty(size, dtype=torch.bfloat16) for size in sizes[:2])
    sums, places = (
        torch.empty(sizes[2], dtype=torch.float32),
        torch.empty(sizes[3], dtype=torch.int64),
    )
    zeros = torch.zeros(max(inputs, outputs) + 16, dtype=torch.bfloat16)
    record.pairs, record.turned = address(pairs), address(turned)
    record.sums, record.places, record.zeros = address(sums), address(places), address(zeros)
    tiles.suanli_weights(ctypes.byref(record))
    return result


def _own_kernel(weight: Tensor, padding: int) -> bool:
    height, width = weight.shape[2:]
    square = height == width and height % 2 == 1 and padding <= height // 2
    wide = weight.shape[1] >= _LEAST_INPUTS
    return square and wide and height * width <= _MOST_TAPS and tile_library() is not None


def _low(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16, memory_format=torch.channels_last)


def _rows(images: Tensor) -> Tensor:
    return images.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("suanli::conv2d", mutates_args=(), device_types="cpu")
def conv2d(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """A convolution of stride 1 in bf16, channels last.

    Args:
        images: [B, I, H, W]; computed with as bf16.
        weight: fp32 [O, I, K, K].
        bias: fp32 [O], or None.
        padding: On each side.
    """
    low_bias = None if bias is None else bias.to(torch.bfloat16)
    result = torch.conv2d(_rows(images), _low(weight), low_bias, 1, padding)
    return result.contiguous(memory_format=torch.channels_last)


@conv2d.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    height, width = (
        side + 2 * padding - kernel + 1
        for side, kernel in zip(images.shape[2:], weight.shape[2:], strict=True)
    )
    shape = (images.shape[0], weight.shape[0], height, width)
    return torch.empty(
        shape, dtype=torch.bfloat16, device=images.device, memory_format=torch.channels_last
    )


@torch.library.custom_op("suanli::conv2d_backward", mutates_args=(), device_types="cpu")
def conv2d_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of images, weight and bias; an empty tensor for each that is not wanted."""
    gradient, low_images = _rows(gradient), _rows(images)
    own = wanted[1] and _own_kernel(weight, padding)
    by_images, by_weight = torch.empty(0), torch.empty(0)
    if wanted[0] or (wanted[1] and not own):
        by_images, by_weight, _ = torch.ops.aten.convolution_backward(
            *(gradient, low_images, _low(weight), None, [1, 1], [padding, padding], [1, 1]),
            *(False, [0, 0], 1, [wanted[0], wanted[1] and not own, False]),
        )
    if own:
        by_weight = weight_gradient(gradient, low_images, weight.shape[2], padding)
    by_bias = gradient.sum((0, 2, 3), dtype=torch.float32) if wanted[2] else torch.empty(0)
    # Results of an operator must be tensors, and may not share memory.
    return [
        by_images.contiguous(memory_format=torch.channels_last) if wanted[0] else torch.empty(0),
        by_weight.float() if wanted[1] else torch.empty(0),
        by_bias,
    ]


@conv2d_backward.register_fake
def _(
    gradient: Tensor, images: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> list[Tensor]:
    like_images = torch.empty(
        images.shape,
        dtype=torch.bfloat16,
        device=images.device,
        memory_format=torch.channels_last,
    )
    like_weight = torch.empty(weight.shape, device=weight.device, memory_format=torch.channels_last)
    likes = [like_images, like_weight, weight.new_empty(weight.shape[0])]
    return [like if want else weight.new_empty(0) for like, want in zip(likes, wanted, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, ctx.padding = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(images, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, weight = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    by_images, by_weight, by_bias = conv2d_backward(gradient, images, weight, ctx.padding, wanted)
    return (
        by_images.to(images.dtype) if wanted[0] else None,
        by_weight if wanted[1] else None,
        by_bias if wanted[2] else None,
        None,
    )


conv2d.register_autograd(_backward, setup_context=_keep)
