"""Models and inputs without data: the same shapes, types and strides, and no memory."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from suanli.base.errors import CaptureError

# Only what is asked for is read from this: no operator runs on real data.
Fakes = dict[int, torch.Tensor]


def new_mode() -> FakeTensorMode:
    """A mode under which nothing is computed; constants of the model may stay real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode, memo: Fakes) -> torch.Tensor:
    """A fake twin on the CPU, the same one for the same tensor.

    A twin on a GPU that needs gradients would end the process of a torch built without CUDA, and
    counts do not depend on the device.

    Raises:
        CaptureError: The tensor has no shape yet (a lazy module that never ran).
    """
    if id(tensor) in memo:
        return memo[id(tensor)]
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise CaptureError(
            "the model has a lazy module without shapes",
            operator=type(tensor).__name__,
            next_step="call the model once on a real batch before",
        )
    plain = type(tensor) in (torch.Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)
    if plain and tensor.layout is torch.strided and not tensor.is_quantized:
        with mode, torch.no_grad():
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                twin.requires_grad_()
    else:
        twin = mode.from_tensor(tensor)
    memo[id(tensor)] = twin
    return twin


def fake_inputs(value: Any, mode: FakeTensorMode, memo: Fakes) -> Any:
    """Nested arguments with every tensor replaced by its twin."""
    return pytree.tree_map(
        lambda leaf: fake_tensor(leaf, mode, memo) if isinstance(leaf, torch.Tensor) else leaf,
        value,
    )


def fake_module(module: nn.Module, mode: FakeTensorMode, memo: Fakes) -> nn.Module | None:
    """A copy of the module with fake parameters and buffers, or None where it cannot be copied.

    Raises:
        CaptureError: The module has parameters without shapes.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        fake_tensor(tensor, mode, memo)
    known: dict[int, Any] = dict(memo)
    try:
        with mode, FakeCopyMode(mode), warnings.catch_warnings():
            # torch warns of its own class in an exported module
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            return copy.deepcopy(module, known)
    except Exception:  # attributes may refuse in any way they like
        return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside the wrappers of `torch.compile` and data parallelism."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
