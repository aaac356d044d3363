"""`suanli::attention_weights`: the softmax of attention in bf16, with its gradient."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suanli.training.native.library import address, kernels, need

SOURCE = Path(__file__).with_name("attention.c")
LANES, MOST_KEYS = 16, 8192  # as in attention.c
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Weighing(ctypes.Structure):
    """The argument of both functions of attention.c, field by field as in C."""

    _fields_ = (
        *((name, _LONG) for name in ("matrices", "queries", "keys")),
        *((name, _INT) for name in ("causal", "threads")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("scores", "gradient", "weights", "by_scores")),
    )


@cache
def _library() -> ctypes.CDLL:
    return kernels(SOURCE, {"suanli_weigh": (Weighing,), "suanli_weigh_backward": (Weighing,)})


def _record(like: Tensor, scale: float, causal: bool, **addresses: Any) -> Weighing:
    queries, keys = like.shape[-2:]
    right = like.dtype is torch.bfloat16 and keys % LANES == 0 and keys <= MOST_KEYS
    need(right, f"bf16 [..., queries, keys], keys a multiple of {LANES}, {MOST_KEYS} at most")
    return Weighing(
        matrices=like.numel() // max(1, queries * keys),
        queries=queries,
        keys=keys,
        causal=causal,
        threads=torch.get_num_threads(),
        scale=scale,
        **addresses,
    )


@torch.library.custom_op("suanli::attention_weights", mutates_args=(), device_types="cpu")
def attention_weights(scores: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax of scale * scores along the last dimension.

    Args:
        scores: bf16 [..., queries, keys], keys a multiple of 16 and at most 8,192.
        scale: A positive factor.
        causal: Whether query i sees the keys 0 to i only.
    """
    scores = scores.contiguous()
    result = torch.empty_like(scores)
    record = _record(scores, scale, causal, scores=address(scores), weights=address(result))
    _library().suanli_weigh(ctypes.byref(record))
    return result


@attention_weights.register_fake
def _(scores: Tensor, scale: float, causal: bool) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("suanli::attention_weights_backward", mutates_args=(), device_types="cpu")
def attention_weights_backward(
    gradient: Tensor, weights: Tensor, scale: float, causal: bool
) -> Tensor:
    """Gradient with respect to the scores."""
    gradient, weights = gradient.to(torch.bfloat16).contiguous(), weights.contiguous()
    need(gradient.shape == weights.shape, "a gradient of the weights' shape")
    result = torch.empty_like(weights)
    record = _record(
        *(weights, scale, causal),
        gradient=address(gradient),
        weights=address(weights),
        by_scores=address(result),
    )
    _library().suanli_weigh_backward(ctypes.byref(record))
    return result


@attention_weights_backward.register_fake
def _(gradient: Tensor, weights: Tensor, scale: float, causal: bool) -> Tensor:
    return weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (weights,) = ctx.saved_tensors
    return attention_weights_backward(gradient, weights, ctx.scale, ctx.causal), None, None


attention_weights.register_autograd(_backward, setup_context=_keep)
