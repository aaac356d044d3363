"""`suanli::bias_act`: what stands behind a convolution without batch norm.

[2x2 max-pool] - bias - activation on bf16 in channels-last layout, as one operator with a gradient.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suanli.training.native.library import BLOCK, CHUNKS, KINDS, address, kernels, need, vector
from suanli.training.native.operators import (
    empty_rows,
    fits_masks,
    need_images,
    pooled_sizes,
    rows,
    shape_fields,
)

SOURCE = Path(__file__).with_name("bias.c")
_RELU = KINDS["relu"]
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Biased(ctypes.Structure):
    """The argument of `suanli_bias_forward` and `suanli_bias_backward`."""

    _fields_ = (
        *((name, _LONG) for name in ("images", "height", "width", "channels")),
        *((name, _INT) for name in ("pooled", "kind", "threads")),
        *(
            (name, _POINTER)
            for name in (
                *("bias", "input", "values", "output", "masks"),
                *("kept", "output_gradient", "input_gradient", "bias_gradient"),
                *("partial", "lines"),
            )
        ),
    )


@cache
def _library() -> ctypes.CDLL:
    return kernels(SOURCE, {"suanli_bias_forward": (Biased,), "suanli_bias_backward": (Biased,)})


@torch.library.custom_op("suanli::bias_act", mutates_args=(), device_types="cpu")
def bias_act(
    images: Tensor, bias: Tensor | None, pool: bool, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool, add an offset per channel, activate.

    Args:
        images: bf16 [B, C, H, W], C a multiple of 32.
        bias: fp32 [C], or None for zeros.
        pool: Whether a 2x2 max-pool comes first.
        kind: A value of `library.KINDS`.

    Returns:
        The result; and for the backward pass the pooled values and where the largest pixels were
        (the values are empty where the result or the images tell the slope, the places without a
        pool).
    """
    need_images(images, some=False)
    images, bias = rows(images), vector(bias, images.shape[1])
    height, width = pooled_sizes(images, pool)
    result = empty_rows(images, height, width)
    apart = pool and kind != _RELU
    values = empty_rows(images, height, width) if apart else images.new_empty(0)
    masks = torch.empty(result.numel() // BLOCK if pool else 0, 2, dtype=torch.int32)
    record = Biased(
        **shape_fields(images, pool, kind),
        bias=address(bias),
        input=address(images),
        values=address(values if apart else result),
        output=address(result),
        masks=address(masks),
    )
    _library().suanli_bias_forward(ctypes.byref(record))
    return result, values, masks


@bias_act.register_fake
def _(images: Tensor, bias: Tensor | None, pool: bool, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    height, width = pooled_sizes(images, pool)
    result = empty_rows(images, height, width)
    apart = pool and kind != _RELU
    values = empty_rows(images, height, width) if apart else images.new_empty(0)
    blocks = result.numel() // BLOCK if pool else 0
    return result, values, images.new_empty((blocks, 2), dtype=torch.int32)


@torch.library.custom_op("suanli::bias_act_backward", mutates_args=(), device_types="cpu")
def bias_act_backward(
    gradient: Tensor,
    kept: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    kind: int,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the images and to the bias.

    Args:
        gradient: Of the result.
        kept: What tells the slope: the result for a ReLU, else what came before the bias.
        masks: Where the largest pixels were; empty without a pool.
        bias: As in the forward pass.
        sizes: Height and width of the images.
        kind: As in the forward pass.
    """
    pool = list(gradient.shape[2:]) != list(sizes)
    gradient, kept, masks = rows(gradient.to(torch.bfloat16)), rows(kept), masks.contiguous()
    result = empty_rows(gradient, *sizes)
    need_images(result, some=False)
    channels = gradient.shape[1]
    bias = vector(bias, channels)
    need(
        gradient.shape == kept.shape == (*result.shape[:2], *pooled_sizes(result, pool))
        and kept.dtype is torch.bfloat16
        and (not pool or fits_masks(masks, kept)),
        "a gradient and kept values of the result's shape, and places of the largest for each",
    )
    by_bias = torch.empty(channels, dtype=torch.float32)
    partial = torch.empty(CHUNKS, channels, dtype=torch.float32)
    line = CHUNKS * (sizes[1] // 2) * channels if pool else 0
    lines = torch.empty(line, dtype=torch.bfloat16)
    record = Biased(
        **shape_fields(result, pool, kind),
        bias=address(bias),
        masks=address(masks),
        kept=address(kept),
        output_gradient=address(gradient),
        input_gradient=address(result),
        bias_gradient=address(by_bias),
        partial=address(partial),
        lines=address(lines),
    )
    _library().suanli_bias_backward(ctypes.byref(record))
    return result, by_bias


@bias_act_backward.register_fake
def _(
    gradient: Tensor,
    kept: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    kind: int,
) -> tuple[Tensor, Tensor]:
    like = gradient.to(torch.bfloat16)
    return empty_rows(like, *sizes), gradient.new_empty(gradient.shape[1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, bias, pool, ctx.kind = inputs
    result, values, masks = output
    ctx.mark_non_differentiable(values, masks)
    ctx.set_materialize_grads(False)
    ctx.sizes = list(images.shape[2:])
    before = values if pool else images
    kept = result if ctx.kind == _RELU else before
    ctx.save_for_backward(kept, masks, bias)


def _backward(ctx: Any, gradient: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None
    kept, masks, bias = ctx.saved_tensors
    by_images, by_bias = bias_act_backward(gradient, kept, masks, bias, ctx.sizes, ctx.kind)
    return by_images, by_bias if bias is not None else None, None, None


bias_act.register_autograd(_backward, setup_context=_keep)
