"""RMSNorm and LayerNorm as operators, with an optional residual sum before."""

from typing import Any

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs, wide
from suanli.kernels.shipped.norms import BACKWARD, FORWARD, WIDEST

_EPS = 1e-5


@torch.library.custom_op("suanli::norm", mutates_args=())
def _operator(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs: Inputs = {
        **{"x": x, "residual": residual, "weight": weight, "bias": bias},
        **{"eps": eps, "centred": centred},
    }
    if usable(x) and x.shape[-1] <= WIDEST and x.numel():
        out, total, mean, rstd = FORWARD.run(inputs, choose(FORWARD, inputs, x))
    else:
        out, total, mean, rstd = FORWARD.elsewhere(inputs)
    # an operator may not give back one of its inputs, nor one tensor twice
    return (
        out,
        x.new_empty(0) if residual is None else total,
        mean if centred else rstd.new_empty(0),
        rstd,
    )


@_operator.register_fake
def _fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.numel() // x.shape[-1]
    statistic = x.new_empty(rows, dtype=wide(x.dtype))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        out,
        x.new_empty(0) if residual is None else torch.empty_like(out),
        torch.empty_like(statistic) if centred else statistic.new_empty(0),
        statistic,
    )


@torch.library.custom_op("suanli::norm_backward", mutates_args=())
def _backward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    bias: bool,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs: Inputs = {
        **{"x": x, "weight": weight, "mean": mean if centred else rstd, "rstd": rstd},
        **{"grad_out": grad_out, "grad_sum": grad_sum, "bias": bias},
        **{"eps": eps, "centred": centred},
    }
    if usable(x) and x.shape[-1] <= WIDEST and x.numel():
        grads = BACKWARD.run(inputs, choose(BACKWARD, inputs, x))
    else:
        grads = BACKWARD.elsewhere(inputs)
    return (*grads[:2], grads[2] if bias else weight.new_empty(0))  # type: ignore[return-value]


@_backward_operator.register_fake
def _backward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    bias: bool,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight)
    return grad_x, grad_weight, torch.empty_like(weight) if bias else weight.new_empty(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.centred = inputs
    ctx.residual, ctx.bias = residual is not None, bias is not None
    _, total, mean, rstd = output
    ctx.save_for_backward(total if ctx.residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Any, grad_sum: Any, *_: Any) -> tuple[Any, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    grad_sum = grad_sum if ctx.residual else None
    if grad_out is None:
        return grad_sum, grad_sum, None, None, None, None
    grad_x, grad_weight, grad_bias = _backward_operator(
        x, weight, mean, rstd, grad_out, grad_sum, ctx.bias, ctx.eps, ctx.centred
    )
    of_residual = grad_x if ctx.residual else None
    return grad_x, of_residual, grad_weight, grad_bias if ctx.bias else None, None, None


_operator.register_autograd(_autograd, setup_context=_remember)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = _EPS) -> torch.Tensor:
    """Compute x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    Args:
        x: [..., width].
        weight: [width].
        eps: Added under the root.
    """
    made: torch.Tensor = _operator(x, None, weight, None, eps, False)[0]
    return made


def _alike(x: torch.Tensor, residual: torch.Tensor) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise BadInputError(
            f"x and the residual differ: {tuple(x.shape)} {x.dtype}, "
            f"{tuple(residual.shape)} {residual.dtype}",
            next_step="bring them to one shape and dtype: the sum is kept in it",
        )


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = _EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, and the sum itself for the next residual connection.

    Raises:
        BadInputError: Shape or dtype of the two differ.
    """
    _alike(x, residual)
    out, total, _, _ = _operator(x, residual, weight, None, eps, False)
    return out, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float = _EPS
) -> torch.Tensor:
    """Compute (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    made: torch.Tensor = _operator(x, None, weight, bias, eps, True)[0]
    return made


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float = _EPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of x + residual, and the sum itself for the next residual connection.

    Raises:
        BadInputError: Shape or dtype of the two differ.
    """
    _alike(x, residual)
    out, total, _, _ = _operator(x, residual, weight, bias, eps, True)
    return out, total
