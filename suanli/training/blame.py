"""Where the first value that is not finite came from: a step again, with every operator watched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from suanli.training.forward import Forward
from suanli.training.recipe import Tensors


def first_bad_value(
    model: nn.Module, forward: Forward, inputs: Tensors, labels: torch.Tensor
) -> str:
    """Where it came from, in words that follow "the loss is nan at step 7: ".

    The plan's own forward and backward pass run once more in eager; gradients are left behind.
    """
    for number, tensor in enumerate(inputs):
        if not _finite(tensor):
            row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            return f"input {number} of sample {row} of the batch is not finite"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the update before it made {name} infinite or NaN"
    watch = _Watch()
    with _places(model, watch), watch:
        try:
            forward.gradients(inputs, labels)
        except _FoundError as found:
            return str(found)
        except RuntimeError as error:
            return f"{type(error).__name__} while looking for the operator: {error}"
    return "it did not come again when the step was repeated"


class _FoundError(Exception):
    """Ends the repeated step at the first bad value."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the first operator that makes a value that is not finite from finite ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path: list[str] = []
        self.last = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("empty") or name.startswith("new_empty"):
            return out  # memory that nobody has written yet
        bad = any(not _finite(t) for t in _tensors(out))
        if bad and all(_finite(t) for t in _tensors((args, kwargs or {}))):
            where = f" in {self.path[-1]}" if self.path else self._behind()
            raise _FoundError(f"{name}{where} made the first value that is not finite")
        return out

    def _behind(self) -> str:
        return f", after {self.last}" if self.last else ""


@contextmanager
def _places(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Let the watch know in which module an operator runs."""
    handles = []
    for name, module in model.named_modules():
        title = name or type(module).__name__

        def enter(_m: nn.Module, _a: Any, title: str = title) -> None:
            watch.path.append(title)

        def leave(_m: nn.Module, _a: Any, _o: Any, title: str = title) -> None:
            watch.last = watch.path.pop() if watch.path else title

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    with torch.no_grad():
        return bool(tensor.isfinite().all())
