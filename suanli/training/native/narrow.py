"""`suanli::narrow_conv2d`: a convolution of few channels in fp32, with its gradients."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suanli.training.native.library import Functions, address, kernels, need, vector

SOURCE = Path(__file__).with_name("narrow.c")
MOST_COLUMNS = 7  # of a kernel, as in narrow.c
_TAKES = f"fp32 [B, I, H, W] and [O, I, K, K], K at most {MOST_COLUMNS} and more than the padding"
_THREADS_FROM = 500_000  # multiplications, under which waking a second thread does not pay
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class Narrow(ctypes.Structure):
    """The argument of all functions of narrow.c, field by field as in C."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "inputs", "height", "width", "outputs")),
        *((name, _LONG) for name in ("kernel", "padding")),
        ("threads", ctypes.c_int),
        *(
            (name, _POINTER)
            for name in (
                *("x", "w", "bias", "y", "g", "by_x", "by_w", "by_bias"),
                *("frames", "g_frames", "packed"),
            )
        ),
    )


@cache
def _library() -> ctypes.CDLL:
    steps = ("forward", "by_images", "by_weights")
    functions: Functions = {f"suanli_narrow_{step}": (Narrow,) for step in steps}
    return kernels(SOURCE, {**functions, "suanli_narrow_sizes": (Narrow, _LONG)})


@cache
def _sizes(*shape: int) -> tuple[int, int, int]:
    """Floats of the work space: frames of the images, of the gradient, and packed weights.

    Raises:
        ValueError: These are sizes that the kernel does not take; they are looked at once.
    """
    batch, inputs, height, width, outputs, kernel, padding = shape
    sides = [side + 2 * padding - kernel + 1 for side in (height, width)]
    right = kernel <= MOST_COLUMNS and 0 <= padding < kernel
    need(right and min(batch, inputs, height, width, outputs, *sides) > 0, _TAKES)
    record, sizes = Narrow(*shape), (_LONG * 3)()
    _library().suanli_narrow_sizes(ctypes.byref(record), sizes)
    return sizes[0], sizes[1], sizes[2]


def _record(images: Tensor, weight: Tensor, padding: int, **more: Any) -> tuple[Narrow, Tensor]:
    """The argument, and its work space, which has to live as long.

    Raises:
        ValueError: They are no images and weights that the kernel takes.
    """
    batch, inputs, height, width = images.shape
    outputs, of, kernel, columns = weight.shape
    fp32 = images.dtype is weight.dtype is torch.float32
    need(fp32 and of == inputs and columns == kernel, _TAKES)
    shape = (batch, inputs, height, width, outputs, kernel, padding)  # Narrow's first fields
    sums = batch * outputs * inputs * kernel * kernel * height * width
    sizes = _sizes(*shape)
    space = torch.empty(sum(sizes), dtype=torch.float32)
    start = space.data_ptr()
    record = Narrow(
        *shape,
        threads=torch.get_num_threads() if sums >= _THREADS_FROM else 1,
        w=address(weight),
        frames=start,
        g_frames=start + 4 * sizes[0],
        packed=start + 4 * (sizes[0] + sizes[1]),
        **more,
    )
    return record, space


def _result_shape(images: Tensor, weight: Tensor, padding: int) -> tuple[int, int, int, int]:
    height, width = (side + 2 * padding - weight.shape[2] + 1 for side in images.shape[2:])
    return images.shape[0], weight.shape[0], height, width


@torch.library.custom_op("suanli::narrow_conv2d", mutates_args=(), device_types="cpu")
def narrow_conv2d(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """A convolution of stride 1 in fp32.

    Args:
        images: fp32 [B, I, H, W].
        weight: fp32 [O, I, K, K], K at most 7.
        bias: fp32 [O], or None.
        padding: On each side, less than K.
    """
    images, weight = images.contiguous(), weight.contiguous()
    bias = vector(bias, weight.shape[0])
    result = torch.empty(_result_shape(images, weight, padding), dtype=torch.float32)
    record, _space = _record(
        *(images, weight, padding), x=address(images), bias=address(bias), y=address(result)
    )
    _library().suanli_narrow_forward(ctypes.byref(record))
    return result


@narrow_conv2d.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    return images.new_empty(_result_shape(images, weight, padding))


@torch.library.custom_op("suanli::narrow_conv2d_backward", mutates_args=(), device_types="cpu")
def narrow_conv2d_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of images, weight and bias; an empty tensor for each that is not wanted."""
    gradient, images, weight = (t.contiguous() for t in (gradient, images, weight))
    right = gradient.shape == _result_shape(images, weight, padding)
    need(right and gradient.dtype is torch.float32, "a gradient in fp32 of the result's shape")
    by_images = images.new_empty(images.shape if wanted[0] else 0)
    weighs = wanted[1] or wanted[2]
    by_weight = weight.new_empty(weight.shape if weighs else 0)
    by_bias = weight.new_empty(weight.shape[0] if wanted[2] else 0)
    record, _space = _record(
        *(images, weight, padding),
        x=address(images),
        g=address(gradient),
        by_x=address(by_images),
        by_w=address(by_weight),
        by_bias=address(by_bias) if wanted[2] else None,
    )
    if wanted[0]:
        _library().suanli_narrow_by_images(ctypes.byref(record))
    if weighs:
        _library().suanli_narrow_by_weights(ctypes.byref(record))
    return [by_images, by_weight if wanted[1] else weight.new_empty(0), by_bias]


@narrow_conv2d_backward.register_fake
def _(
    gradient: Tensor, images: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> list[Tensor]:
    shapes: tuple[tuple[int, ...], ...] = (images.shape, weight.shape, (weight.shape[0],))
    return [
        gradient.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, ctx.padding = inputs
    ctx.save_for_backward(images, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, weight = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    found = narrow_conv2d_backward(gradient, images, weight, ctx.padding, wanted)
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None)


narrow_conv2d.register_autograd(_backward, setup_context=_keep)
