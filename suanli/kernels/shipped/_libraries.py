"""Published kernels of the same kind, as rivals in a race; each is imported when it is raced.

Liger Kernel's functional interface, as of its version 0.8.
"""

from typing import Any

import torch

from suanli.base.errors import BadInputError
from suanli.base.lazy import need
from suanli.kernels.declaration import Inputs, Outputs

_INSTALL = "pip install liger-kernel"


def _liger() -> Any:
    return need("liger_kernel.transformers.functional", _INSTALL)


def _tuple(made: Any) -> Outputs:
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def cross_entropy(inputs: Inputs) -> Outputs:
    """Liger's, mean over rows."""
    # it writes gradients over its input where one is asked for; here none is
    made = _liger().liger_cross_entropy(
        inputs["logits"], inputs["target"], label_smoothing=inputs["smoothing"]
    )
    return _tuple(made)


def linear_cross_entropy(inputs: Inputs) -> Outputs:
    """Liger's, mean over rows; it makes the logits a slice of the rows at a time."""
    made = _liger().liger_fused_linear_cross_entropy(
        inputs["x"], inputs["weight"], inputs["target"]
    )
    return _tuple(made)


def norm(inputs: Inputs) -> Outputs:
    """Liger's RMSNorm, with or without a residual, or its LayerNorm without one.

    Raises:
        BadInputError: It has none of this kind.
    """
    x, residual, weight, eps = (inputs[name] for name in ("x", "residual", "weight", "eps"))
    if inputs["centred"]:
        if residual is not None:
            raise BadInputError("Liger has no LayerNorm with a residual")
        return _tuple(_liger().liger_layer_norm(x, weight, inputs["bias"], eps))
    if residual is not None:
        return _tuple(_liger().liger_fused_add_rms_norm(x, residual, weight, eps))
    return _tuple(_liger().liger_rms_norm(x, weight, eps))


def gate(inputs: Inputs) -> Outputs:
    """Liger's SwiGLU, or its GEGLU with tanh.

    Raises:
        BadInputError: It has none of this kind.
    """
    a, b = inputs["a"], inputs["b"]  # it copies parts of wider rows itself, which is its cost
    if inputs["kind"] == "silu":
        return _tuple(_liger().liger_swiglu(a, b))
    if inputs["kind"] == "gelu_tanh":
        return _tuple(_liger().liger_geglu(a, b))
    raise BadInputError("Liger has no exact GEGLU")
