"""Activations that the kernels compute, and the layer that hands one to them."""

from typing import cast

import torch
from torch import Tensor, nn

from suanli.training.native.library import KINDS
from suanli.training.twin import hooked

_LAYERS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}


def activation_kind(layer: nn.Module | None) -> str:
    """The name of an activation in `KINDS`, "identity" for none, "" for one that is not there."""
    if layer is None:
        return "identity"
    if hooked(layer) or (type(layer) is nn.GELU and layer.approximate != "none"):
        return ""
    return _LAYERS.get(type(layer), "")


class FusedActivation(nn.Module):
    """An activation of bf16 tensors; others go to the layer itself.

    Args:
        layer: What it takes the place of.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._kind = KINDS[activation_kind(layer)]

    def forward(self, values: Tensor) -> Tensor:
        """The same shape."""
        from suanli.training.native.operators import act, in_blocks

        if values.dtype is not torch.bfloat16 or not in_blocks(values):
            return cast(Tensor, self.layer(values))
        return cast(Tensor, act(values, self._kind))


def fused_activation(layer: nn.Module) -> FusedActivation | None:
    """What computes a GELU or SiLU; None for other layers."""
    return FusedActivation(layer) if activation_kind(layer) in ("gelu", "silu") else None
