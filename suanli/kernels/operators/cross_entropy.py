"""Softmax cross-entropy as an operator."""

from typing import Any

import torch

from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs, wide
from suanli.kernels.shipped.cross_entropy import BACKWARD, FORWARD


def _inputs(logits: torch.Tensor, target: torch.Tensor, ignored: int, smoothing: float) -> Inputs:
    return {"logits": logits, "target": target, "ignored": ignored, "smoothing": smoothing}


@torch.library.custom_op("suanli::cross_entropy", mutates_args=())
def _operator(
    logits: torch.Tensor, target: torch.Tensor, ignored: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = _inputs(logits, target, ignored, smoothing)
    if usable(logits, target) and logits.numel():
        loss, lse = FORWARD.run(inputs, choose(FORWARD, inputs, logits))
    else:
        loss, lse = FORWARD.elsewhere(inputs)
    return loss, lse


@_operator.register_fake
def _fake(
    logits: torch.Tensor, target: torch.Tensor, ignored: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    return loss, torch.empty_like(loss)


@torch.library.custom_op("suanli::cross_entropy_backward", mutates_args=())
def _backward_operator(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    grad_loss: torch.Tensor,
    ignored: int,
    smoothing: float,
) -> torch.Tensor:
    inputs = {**_inputs(logits, target, ignored, smoothing), "lse": lse, "grad_loss": grad_loss}
    if usable(logits, target) and logits.numel():
        return BACKWARD.run(inputs, choose(BACKWARD, inputs, logits))[0]
    return BACKWARD.elsewhere(inputs)[0].contiguous()


@_backward_operator.register_fake
def _backward_fake(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    grad_loss: torch.Tensor,
    ignored: int,
    smoothing: float,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, ctx.ignored, ctx.smoothing = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[Any, ...]:
    logits, target, lse = ctx.saved_tensors
    grad = _backward_operator(logits, target, lse, grad_loss, ctx.ignored, ctx.smoothing)
    return grad, None, None, None


_operator.register_autograd(_autograd, setup_context=_remember)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean softmax cross-entropy over the rows whose target is not `ignore_index`.

    Args:
        logits: [rows, classes] in fp32, fp16 or bf16; sums are kept in fp32.
        target: [rows] int64.
        ignore_index: Target of rows that do not count.
        label_smoothing: Part of the weight that is spread over all classes, 0 to 1.
    """
    losses: torch.Tensor = _operator(logits, target, ignore_index, label_smoothing)[0]
    return losses.sum() / (target != ignore_index).sum()
