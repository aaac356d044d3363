"""Linear layer and cross-entropy as one operator."""

from typing import Any

import torch

from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs, wide
from suanli.kernels.shipped.linear_cross_entropy import BACKWARD, FORWARD


@torch.library.custom_op("suanli::linear_cross_entropy", mutates_args=())
def _operator(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs: Inputs = {"x": x, "weight": weight, "target": target, "ignored": ignored}
    if usable(x, weight, target) and x.numel():
        loss, lse = FORWARD.run(inputs, choose(FORWARD, inputs, x))
    else:
        loss, lse = FORWARD.elsewhere(inputs)
    return loss, lse


@_operator.register_fake
def _fake(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    return loss, torch.empty_like(loss)


@torch.library.custom_op("suanli::linear_cross_entropy_backward", mutates_args=())
def _backward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    grad_loss: torch.Tensor,
    ignored: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs: Inputs = {
        **{"x": x, "weight": weight, "target": target, "ignored": ignored},
        **{"lse": lse, "grad_loss": grad_loss},
    }
    if usable(x, weight, target) and x.numel():
        grad_x, grad_weight = BACKWARD.run(inputs, choose(BACKWARD, inputs, x))
    else:
        grad_x, grad_weight = BACKWARD.elsewhere(inputs)
    return grad_x.contiguous(), grad_weight.contiguous()


@_backward_operator.register_fake
def _backward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    grad_loss: torch.Tensor,
    ignored: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    plain = torch.contiguous_format
    return torch.empty_like(x, memory_format=plain), torch.empty_like(weight, memory_format=plain)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, target, ctx.ignored = inputs
    ctx.save_for_backward(x, weight, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, target, lse = ctx.saved_tensors
    grads = _backward_operator(x, weight, target, lse, grad_loss, ctx.ignored)
    return (*grads, None, None)


_operator.register_autograd(_autograd, setup_context=_remember)


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, ignore_index: int = -100
) -> torch.Tensor:
    """Mean cross-entropy of the logits x @ weight.T, which on a GPU never reach memory.

    Args:
        x: [rows, width].
        weight: [classes, width]; taken in the dtype of x, or in autocast's.
        target: [rows] int64.
        ignore_index: Target of rows that do not count.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    losses: torch.Tensor = _operator(x, weight, target, ignore_index)[0]
    return losses.sum() / (target != ignore_index).sum()
