"""Batch normalisation, activation and max-pool as one operator for training."""

from typing import Any

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs, wide
from suanli.kernels.shipped.batch_norm import ACTIVATIONS, BACKWARD, FORWARD, pooled


@torch.library.custom_op("suanli::batch_norm", mutates_args=())
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: str,
    pool: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs: Inputs = {
        **{"x": x, "weight": weight, "bias": bias},
        **{"eps": eps, "activation": activation, "pool": tuple(pool)},
    }
    if usable(x) and x.numel():
        made = FORWARD.run(inputs, choose(FORWARD, inputs, x))
    else:
        made = FORWARD.elsewhere(inputs)
    out, mean, rstd, variance, tap = made
    last = torch.channels_last
    tap = tap.contiguous(memory_format=last) if tap.numel() else tap
    return out.contiguous(memory_format=last), mean, rstd, variance, tap


@_operator.register_fake
def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: str,
    pool: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    height, width = pooled(x, (pool[0], pool[1], pool[2]))
    out = x.new_empty(x.shape[0], x.shape[1], height, width)
    out = out.contiguous(memory_format=torch.channels_last)
    statistic = x.new_empty(x.shape[1], dtype=wide(x.dtype))
    tap = torch.empty_like(out, dtype=torch.uint8) if pool[0] else x.new_empty(0).byte()
    return out, statistic, torch.empty_like(statistic), torch.empty_like(statistic), tap


@torch.library.custom_op("suanli::batch_norm_backward", mutates_args=())
def _backward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    tap: torch.Tensor,
    grad: torch.Tensor,
    eps: float,
    activation: str,
    pool: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs: Inputs = {
        **{"x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd, "tap": tap},
        **{"grad": grad, "eps": eps, "activation": activation, "pool": tuple(pool)},
    }
    if usable(x) and x.numel():
        grads = BACKWARD.run(inputs, choose(BACKWARD, inputs, x))
    else:
        grads = BACKWARD.elsewhere(inputs)
    return grads[0].contiguous(memory_format=torch.channels_last), grads[1], grads[2]


@_backward_operator.register_fake
def _backward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    tap: torch.Tensor,
    grad: torch.Tensor,
    eps: float,
    activation: str,
    pool: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, ctx.eps, ctx.activation, ctx.pool = inputs
    _, mean, rstd, variance, tap = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, tap)
    ctx.mark_non_differentiable(mean, rstd, variance, tap)


def _autograd(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd, tap = ctx.saved_tensors
    options = (ctx.eps, ctx.activation, ctx.pool)
    grads = _backward_operator(x, weight, bias, mean, rstd, tap, grad, *options)
    return (*grads, None, None, None)


_operator.register_autograd(_autograd, setup_context=_remember)


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    activation: str = "relu",
    pool: tuple[int, int, int] | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch norm over this batch's statistics, then an activation, then an optional max-pool.

    Args:
        x: [N, C, H, W].
        weight: [C].
        bias: [C].
        activation: "none", "relu" or "silu".
        pool: (size, stride, padding) of a square max-pool, or None.
        eps: Added to the variance.

    Returns:
        The output in channels-last memory, the batch's mean and its biased variance per channel,
        for the running averages that the caller keeps.

    Raises:
        BadInputError: The activation is unknown, or the pool is wider than a byte can count.
    """
    if activation not in ACTIVATIONS:
        raise BadInputError(
            f"unknown activation {activation!r}", next_step=f"one of {', '.join(ACTIVATIONS)}"
        )
    size, stride, padding = pool or (0, 1, 0)
    if size > 15 or 2 * padding > size:
        raise BadInputError(
            f"no max-pool of size {size} with padding {padding}",
            next_step="the size is at most 15 and the padding at most half of it",
        )
    out, mean, _, variance, _ = _operator(x, weight, bias, eps, activation, [size, stride, padding])
    return out, mean, variance
