"""The row "attention" of the kernel table: attention by matrix products with a softmax of our own.

The library's fused attention keeps no weights and computes them anew in its backward pass, which
takes five times as long as the forward pass on a CPU. At lengths whose weights fit into memory, two
products of matrices around one pass over the scores, and four around another one back, are faster:
matrix units do them. GELU and SiLU layers go to the kernels for activations as well.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.activations import fused_activation
from suanli.training.native.library import library
from suanli.training.twin import replace_children, twin_of
from suanli.workloads.record import Workload

_NAME = "scaled_dot_product_attention"
_WEIGHT_BYTES = 512 << 20  # of the weights of one call, above which the library's own does it


def own_attention(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """A twin of the model that shares its parameters and buffers and attends by products.

    Args:
        model: It is not changed.
        plan: On the CPU, in bf16.

    Raises:
        BadInputError: The plan computes in another way.
        MissingBackendError: There is no C compiler.
        CompilerError: It cannot build the kernels.
    """
    if (plan.kind, plan.precision) != ("cpu", "bf16"):
        raise BadInputError("attention by products computes on the CPU in bf16")
    library()
    twin = twin_of(model)
    for module in list(twin.modules()):
        replace_children(module, fused_activation)
    return Attending(twin)


def suits_own_attention(model: nn.Module, workload: Workload | None = None) -> bool:
    """Whether some layer of the model calls torch's attention, as far as its code shows."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", "") == "sdpa":
        return True
    kinds = {type(module) for module in model.modules()}
    return nn.MultiheadAttention in kinds or any(map(_calls_attention, kinds))


class Attending(nn.Module):
    """A model whose calls of `scaled_dot_product_attention` go by products.

    Args:
        inner: The model.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        with _Products():
            return self.inner(*args, **kwargs)


class _Products(TorchFunctionMode):
    """Catches the calls of attention that the kernels can do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            found = _attended(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention by products; None where the library's own has to do it. Arguments as torch's."""
    from suanli.training.native.attention import LANES, MOST_KEYS, attention_weights

    if attn_mask is not None or dropout_p or enable_gqa:
        return None
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    keys = key.shape[-2]
    size = 2 * query[..., 0].numel() * keys
    low = query.dtype is key.dtype is value.dtype is torch.bfloat16
    if not (low and same and keys % LANES == 0 and 0 < keys <= MOST_KEYS and size <= _WEIGHT_BYTES):
        return None
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-2, -1)
    attended: Tensor = attention_weights(scores, factor, is_causal) @ value
    return attended


def _calls_attention(kind: type[nn.Module]) -> bool:
    """Whether a method of a class, or of those that it derives from, names torch's attention."""
    methods = (value for one in kind.__mro__ for value in vars(one).values())
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(code is not None and _NAME in code.co_names for code in codes)
