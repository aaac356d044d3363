"""Optimiser steps over many tensors, in place."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import DTYPES, Inputs
from suanli.kernels.shipped.optimizers import ADAMW, MUON


@torch.library.custom_op("suanli::adamw_", mutates_args=("params", "averages", "squares"))
def _adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    averages: list[torch.Tensor],
    squares: list[torch.Tensor],
    lr: float,
    betas: list[float],
    eps: float,
    decay: float,
    step: int,
) -> None:
    inputs: Inputs = {
        **{"params": params, "grads": grads, "averages": averages, "squares": squares},
        **{"lr": lr, "beta1": betas[0], "beta2": betas[1]},
        **{"eps": eps, "decay": decay, "step": step},
    }
    if usable(*params, *grads):
        ADAMW.run(inputs, choose(ADAMW, inputs, params[0]))
    else:
        ADAMW.elsewhere(inputs)


@torch.library.custom_op("suanli::muon_", mutates_args=("params", "averages"))
def _muon(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    averages: list[torch.Tensor],
    lr: float,
    beta: float,
    decay: float,
    low: bool,
) -> None:
    inputs: Inputs = {
        **{"params": params, "grads": grads, "averages": averages},
        **{"lr": lr, "beta": beta, "decay": decay, "low": low},
    }
    if usable(*params, *grads):
        MUON.run(inputs, choose(MUON, inputs, params[0]))
    else:
        MUON.elsewhere(inputs)


def _alike(*lists: Sequence[torch.Tensor]) -> None:
    """Refuse what the kernels' flat view of memory would get wrong."""
    if len({len(tensors) for tensors in lists}) != 1:
        raise BadInputError("parameters, gradients and state must be as many")
    for group in zip(*lists, strict=True):
        if len({t.shape for t in group}) != 1:
            raise BadInputError(
                f"a parameter and its state differ: {[*map(tuple, _shapes(group))]}"
            )
        if any(t.stride() != group[0].stride() or not _dense(t) for t in group):
            raise BadInputError(
                "a parameter, its gradient and its state must lie in memory alike, without gaps"
            )
        if any(t.dtype not in DTYPES.values() for t in group):
            raise BadInputError("parameters and state must be fp32, fp16 or bf16")


def _shapes(group: Sequence[torch.Tensor]) -> list[torch.Size]:
    return [t.shape for t in group]


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill its memory, in any order."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != extent:
            return False
        extent *= size
    return True


def _groups(*lists: Sequence[torch.Tensor], by_shape: bool) -> list[list[list[torch.Tensor]]]:
    """Lists whose tensors share device and dtypes, and the first one's shape where asked."""
    found: defaultdict[object, list[list[torch.Tensor]]] = defaultdict(lambda: [[] for _ in lists])
    for group in zip(*lists, strict=True):
        shape = group[0].shape if by_shape else None
        key = (shape, *((t.device, t.dtype) for t in group))
        for into, tensor in zip(found[key], group, strict=True):
            into.append(tensor)
    return list(found.values())


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    step: int,
) -> None:
    """One AdamW step in place, one launch per group of equal dtypes.

    Not to be captured in a CUDA graph: addresses of the tensors are copied in at each call.

    Args:
        params: Parameters; fp32, fp16 or bf16.
        grads: Their gradients.
        averages: Running means of the gradients, usually fp32.
        squares: Running means of their squares.
        lr: Learning rate.
        betas: Decay of the two means.
        eps: Added to the root of the second.
        weight_decay: Decoupled decay.
        step: Number of this step, from 1.

    Raises:
        BadInputError: The lists do not match.
    """
    _alike(params, grads, averages, squares)
    for group in _groups(params, grads, averages, squares, by_shape=False):
        _adamw(*group, lr, list(betas), eps, weight_decay, step)


def muon_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    *,
    lr: float,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    low_precision: bool = True,
) -> None:
    """One Muon step in place, for matrices only; those of one shape go together.

    Args:
        params: Matrices.
        grads: Their gradients.
        averages: Running means of the gradients.
        lr: Learning rate; multiplied by sqrt(max(1, rows / columns)).
        beta: Decay of the mean, which is looked at one step ahead (Nesterov).
        weight_decay: Decoupled decay.
        low_precision: Whether the Newton-Schulz steps work in bf16.

    Raises:
        BadInputError: The lists do not match, or a parameter is no contiguous matrix.
    """
    _alike(params, grads, averages)
    if any(p.dim() != 2 or not p.is_contiguous() for p in params):
        raise BadInputError(
            "Muon takes contiguous matrices only", next_step="give the others to AdamW"
        )
    for group in _groups(params, grads, averages, by_shape=True):
        _muon(*group, lr, beta, weight_decay, low_precision)
