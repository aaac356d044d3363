"""The kernels as torch operators, with gradients and with shapes for tracing.

`suanli::norm_act` is [2x2 max-pool] - batch norm with the batch's statistics - [+ shortcut] -
[activation] on bf16 in channels-last layout; `suanli::act` is an activation alone.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from suanli.training.native.library import (
    BLOCK,
    CHUNKS,
    Activation,
    Norm,
    address,
    library,
    need,
    vector,
)

_NAMESPACE = "suanli"
_IMAGES = f"bf16 [B, C, H, W], C a multiple of {BLOCK}"


def fits(images: Tensor) -> bool:
    """Whether the kernels can work on this tensor [B, C, H, W]."""
    return (
        images.device.type == "cpu"
        and images.dtype is torch.bfloat16
        and images.dim() == 4
        and images.shape[1] % BLOCK == 0
        and min(images.shape) > 0
    )


def in_blocks(values: Tensor) -> bool:
    """Whether a tensor lies without gaps and fills whole blocks."""
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return (last or values.is_contiguous()) and values.numel() % BLOCK == 0


def need_images(images: Tensor, *, some: bool) -> None:
    """Refuse a tensor that the kernels would read beyond its end.

    Raises:
        ValueError: `fits` does not hold; where there need not be some, none are right too.
    """
    right = fits(images) or (not some and images.numel() == 0 and images.dim() == 4)
    need(right, _IMAGES)


def rows(images: Tensor) -> Tensor:
    """The same values with channels innermost and no gaps."""
    return images.contiguous(memory_format=torch.channels_last)


def empty_rows(images: Tensor, height: int, width: int) -> Tensor:
    """A tensor of another size that lies in memory as `rows` gives it."""
    batch, channels = images.shape[:2]
    shape = (batch, channels, height, width)
    return torch.empty(
        shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last
    )


def fits_masks(masks: Tensor, values: Tensor) -> bool:
    """Whether there are places of the largest pixels for all pooled values."""
    return masks.dtype is torch.int32 and masks.numel() * BLOCK == 2 * values.numel()


def pooled_sizes(images: Tensor, pool: bool) -> tuple[int, int]:
    """Height and width behind the pool, if there is one."""
    height, width = images.shape[2:]
    return (height // 2, width // 2) if pool else (height, width)


@torch.library.custom_op(f"{_NAMESPACE}::norm_act", mutates_args=(), device_types="cpu")
def norm_act(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    pool: bool,
    kind: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool, normalise with the batch's own statistics, scale and shift, add, activate.

    Args:
        images: bf16 [B, C, H, W], C a multiple of 32.
        weight: fp32 [C], or None for ones.
        bias: fp32 [C], or None for zeros.
        added: bf16 of the result's shape, or None; never with a pool.
        pool: Whether a 2x2 max-pool comes first.
        kind: A value of `library.KINDS`.
        eps: Added to the variance.

    Returns:
        The result, mean [C], variance [C] (over the count, not the count less one); and for the
        backward pass: 1 / deviation [C], pooled values, and where the largest pixels were (the last
        two are empty without a pool).
    """
    need_images(images, some=True)
    images, (batch, channels) = rows(images), images.shape[:2]
    weight, bias = vector(weight, channels), vector(bias, channels)
    added = _added_rows(added, images, pool)
    out_height, out_width = pooled_sizes(images, pool)
    result = empty_rows(images, out_height, out_width)
    values = empty_rows(images, out_height, out_width) if pool else images
    blocks = batch * out_height * out_width * channels // BLOCK if pool else 0
    masks = torch.empty(blocks, 2, dtype=torch.int32)
    mean, variance, inverse = torch.empty(3, channels, dtype=torch.float32).unbind()
    partial = torch.empty(CHUNKS, 2, channels, dtype=torch.float32)
    record = Norm(
        **shape_fields(images, pool, kind),
        eps=eps,
        input=address(images),
        values=address(values),
        output=address(result),
        masks=address(masks),
        weight=address(weight),
        bias=address(bias),
        mean=address(mean),
        variance=address(variance),
        inverse=address(inverse),
        partial=address(partial),
        added=address(added),
    )
    library().norm_forward(ctypes.byref(record))
    kept = values if pool else torch.empty(0, dtype=torch.bfloat16)
    return result, mean.clone(), variance.clone(), inverse.clone(), kept, masks


@norm_act.register_fake
def _(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    pool: bool,
    kind: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out_height, out_width = pooled_sizes(images, pool)
    result = empty_rows(images, out_height, out_width)
    statistics = [images.new_empty(images.shape[1], dtype=torch.float32) for _ in range(3)]
    blocks = result.numel() // BLOCK if pool else 0
    kept = empty_rows(images, out_height, out_width) if pool else images.new_empty(0)
    masks = images.new_empty((blocks, 2), dtype=torch.int32)
    return result, statistics[0], statistics[1], statistics[2], kept, masks


@torch.library.custom_op(f"{_NAMESPACE}::norm_act_backward", mutates_args=(), device_types="cpu")
def norm_act_backward(
    gradient: Tensor,
    images: Tensor,
    pooled: list[Tensor],
    statistics: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    mode: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the images, the weight, the bias and what was added.

    The last one is empty where nothing was added.

    Args:
        gradient: Of the result.
        images: As given to the forward pass; with a pool only its shape counts.
        pooled: Values and places of the largest, as the forward pass gave them.
        statistics: Mean and 1 / deviation.
        weight: As in the forward pass.
        bias: As in the forward pass.
        added: As in the forward pass.
        mode: 1 with a pool or 0 without, and the kind, as in the forward pass.
    """
    need_images(images, some=True)
    pool, kind = bool(mode[0]), mode[1]
    batch, channels = images.shape[:2]
    out_height, width = pooled_sizes(images, pool)
    values, masks = rows(pooled[0] if pool else images), pooled[1].contiguous()
    gradient = rows(gradient.to(torch.bfloat16))
    need(
        gradient.shape == values.shape == (batch, channels, out_height, width)
        and values.dtype is torch.bfloat16
        and (not pool or fits_masks(masks, values)),
        "a gradient and values of the result's shape, and places of the largest for each",
    )
    result = empty_rows(images, *images.shape[2:])
    partial = torch.empty(CHUNKS, 2, channels, dtype=torch.float32)
    means = torch.empty(2, channels, dtype=torch.float32)
    lines = torch.empty(CHUNKS * width * channels if pool else 0, dtype=torch.bfloat16)
    mean, inverse = (vector(one, channels) for one in statistics)
    weight, bias = vector(weight, channels), vector(bias, channels)
    weight_gradient = torch.empty(channels, dtype=torch.float32)
    bias_gradient = torch.empty(channels, dtype=torch.float32)
    added = _added_rows(added, images, pool)
    by_added = empty_rows(gradient, *gradient.shape[2:]) if added is not None else torch.empty(0)
    record = Norm(
        **shape_fields(images, pool, kind),
        values=address(values),
        masks=address(masks),
        weight=address(weight),
        bias=address(bias),
        mean=address(mean),
        inverse=address(inverse),
        partial=address(partial),
        output_gradient=address(gradient),
        input_gradient=address(result),
        weight_gradient=address(weight_gradient),
        bias_gradient=address(bias_gradient),
        means=address(means),
        lines=address(lines),
        added=address(added),
        added_gradient=address(by_added),
    )
    library().norm_backward(ctypes.byref(record))
    return result, weight_gradient, bias_gradient, by_added


@norm_act_backward.register_fake
def _(
    gradient: Tensor,
    images: Tensor,
    pooled: list[Tensor],
    statistics: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    mode: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = statistics[0]
    result = empty_rows(images, *images.shape[2:])
    by_added = images.new_empty(0) if added is None else empty_rows(images, *images.shape[2:])
    return result, torch.empty_like(mean), torch.empty_like(mean), by_added


def _added_rows(added: Tensor | None, images: Tensor, pool: bool) -> Tensor | None:
    """A shortcut as the kernels read it.

    Raises:
        ValueError: It is no bf16 of the images' shape, or there is a pool.
    """
    if added is None:
        return None
    right = added.dtype is torch.bfloat16 and added.shape == images.shape and not pool
    need(right, "a shortcut in bf16 of the images' shape, and none with a pool")
    return rows(added)


def shape_fields(images: Tensor, pool: bool, kind: int) -> dict[str, Any]:
    """The fields that the records of all kernels over images begin with."""
    batch, channels, height, width = images.shape
    return {
        "images": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "pooled": int(pool),
        "kind": kind,
        "threads": torch.get_num_threads(),
    }


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, weight, bias, added, ctx.pool, ctx.kind, _ = inputs
    _, mean, variance, inverse, values, masks = output
    ctx.mark_non_differentiable(mean, variance, inverse, values, masks)
    ctx.set_materialize_grads(False)
    ctx.shape = images.shape
    # With a pool the convolution's whole output need not be kept.
    kept = None if ctx.pool else images
    ctx.save_for_backward(kept, weight, bias, added, mean, inverse, values, masks)


def _backward(ctx: Any, gradient: Tensor | None, *_others: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 7
    images, weight, bias, added, mean, inverse, values, masks = ctx.saved_tensors
    if images is None:  # a tensor of the right shape that holds no memory
        images = gradient.new_empty(1, dtype=torch.bfloat16).expand(ctx.shape)
    mode = [int(ctx.pool), ctx.kind]
    by_images, by_weight, by_bias, by_added = norm_act_backward(
        gradient, images, [values, masks], [mean, inverse], weight, bias, added, mode
    )
    return (
        by_images,
        by_weight if weight is not None else None,
        by_bias if bias is not None else None,
        by_added if added is not None else None,
        None,
        None,
        None,
    )


norm_act.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(f"{_NAMESPACE}::act", mutates_args=(), device_types="cpu")
def act(values: Tensor, kind: int) -> Tensor:
    """An activation of bf16 values; `kind` is a value of `library.KINDS`."""
    return _elementwise(values, None, kind)


@torch.library.custom_op(f"{_NAMESPACE}::act_backward", mutates_args=(), device_types="cpu")
def act_backward(gradient: Tensor, values: Tensor, kind: int) -> Tensor:
    """Gradient with respect to the values."""
    return _elementwise(values, gradient, kind)


@act.register_fake
def _(values: Tensor, kind: int) -> Tensor:
    return torch.empty_like(values)


@act_backward.register_fake
def _(gradient: Tensor, values: Tensor, kind: int) -> Tensor:
    return torch.empty_like(values)


def _elementwise(values: Tensor, gradient: Tensor | None, kind: int) -> Tensor:
    need(
        values.dtype is torch.bfloat16 and in_blocks(values),
        f"bf16 without gaps, a multiple of {BLOCK} values",
    )
    result = torch.empty_like(values)
    if gradient is not None:
        need(gradient.shape == values.shape, "a gradient of the values' shape")
        if gradient.dtype is not values.dtype or gradient.stride() != values.stride():
            gradient = torch.empty_like(values).copy_(gradient)
    record = Activation(
        input=address(values),
        output_gradient=address(gradient),
        result=address(result),
        count=values.numel(),
        kind=kind,
        threads=torch.get_num_threads(),
    )
    library().activation(ctypes.byref(record))
    return result


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, ctx.kind = inputs
    ctx.save_for_backward(values)


def _act_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (values,) = ctx.saved_tensors
    return act_backward(gradient.to(torch.bfloat16), values, ctx.kind), None


act.register_autograd(_act_backward, setup_context=_keep_values)
