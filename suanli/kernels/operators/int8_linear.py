"""Linear layers with int8 weights as operators, for inference."""

import torch

from suanli.kernels.configuration import choose, usable
from suanli.kernels.declaration import Inputs
from suanli.kernels.shipped.int8_linear import LINEAR, QUANTIZE


@torch.library.custom_op("suanli::int8_quantize", mutates_args=())
def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs: Inputs = {"weight": weight}
    if usable(weight) and weight.numel():
        q, scale = QUANTIZE.run(inputs, choose(QUANTIZE, inputs, weight))
    else:
        q, scale = QUANTIZE.elsewhere(inputs)
    return q, scale


@_quantize.register_fake
def _quantize_fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    return q, weight.new_empty(weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("suanli::int8_linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    inputs: Inputs = {"x": flat, "weight": weight, "scale": scale, "bias": bias}
    if usable(x, weight) and x.numel():
        out = LINEAR.run(inputs, choose(LINEAR, inputs, x))[0]
    else:
        out = LINEAR.elsewhere(inputs)[0]
    return out.reshape(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def int8_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [columns, inner] as int8 and its scales [columns] in fp32."""
    q, scale = _quantize(weight)
    return q, scale


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute x @ (weight * scale).T + bias, with the weight read as int8.

    Args:
        x: [..., inner].
        weight: [columns, inner] int8, from `int8_quantize`.
        scale: [columns] fp32.
        bias: [columns] or None.
    """
    made: torch.Tensor = _linear(x, weight, scale, bias)
    return made
