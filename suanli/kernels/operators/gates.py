"""Gated activations as operators."""

from typing import Any

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs
from suanli.kernels.shipped.gates import BACKWARD, FORWARD, KINDS


@torch.library.custom_op("suanli::gate", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    inputs: Inputs = {"a": a, "b": b, "kind": kind}
    if usable(a, b) and a.numel():
        return FORWARD.run(inputs, choose(FORWARD, inputs, a))[0]
    return FORWARD.elsewhere(inputs)[0].contiguous()


@_operator.register_fake
def _fake(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("suanli::gate_backward", mutates_args=())
def _backward_operator(
    a: torch.Tensor, b: torch.Tensor, grad: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs: Inputs = {"a": a, "b": b, "grad": grad, "kind": kind}
    if usable(a, b) and a.numel():
        grad_a, grad_b = BACKWARD.run(inputs, choose(BACKWARD, inputs, a))
    else:
        grad_a, grad_b = BACKWARD.elsewhere(inputs)
    return grad_a.contiguous(), grad_b.contiguous()


@_backward_operator.register_fake
def _backward_fake(
    a: torch.Tensor, b: torch.Tensor, grad: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    plain = torch.contiguous_format
    return torch.empty_like(a, memory_format=plain), torch.empty_like(b, memory_format=plain)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, ctx.kind = inputs
    ctx.save_for_backward(a, b)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    return (*_backward_operator(a, b, grad, ctx.kind), None)


_operator.register_autograd(_autograd, setup_context=_remember)


def gate(a: torch.Tensor, b: torch.Tensor, kind: str = "silu") -> torch.Tensor:
    """Compute act(a) * b, element by element.

    Args:
        a: [..., width]; it may be a part of wider rows, as `chunk` gives it.
        b: Of the same shape and dtype.
        kind: "silu" (SwiGLU), "gelu" (GEGLU, exact) or "gelu_tanh".

    Raises:
        BadInputError: The kind is unknown or the shapes differ.
    """
    if kind not in KINDS:
        raise BadInputError(f"unknown gate {kind!r}", next_step=f"one of {', '.join(KINDS)}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise BadInputError(f"a gate needs two tensors alike, not {a.shape} and {b.shape}")
    made: torch.Tensor = _operator(a, b, kind)
    return made
