"""Copies of a model that compute in another way and train the model's own tensors."""

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from suanli.base.errors import BadInputError


def copy_of(model: nn.Module) -> nn.Module:
    """A copy with tensors of its own, whose parameters have the hooks on gradients that these have.

    Raises:
        BadInputError: A hook follows the gradient's accumulation, such as an optimiser of its own.
    """
    twin = copy.deepcopy(model)
    for (name, old), new in zip(model.named_parameters(), twin.parameters(), strict=True):
        if getattr(old, "_post_accumulate_grad_hooks", None):
            raise BadInputError(
                f"{name} has a hook that runs once its gradient is there",
                next_step="remove it: the run updates parameters itself",
            )
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)  # type: ignore[no-untyped-call]
    return twin


def refuse_hooks(model: nn.Module, what: str) -> None:
    """Raise where a parameter has a hook on its gradient, which a way to compute would not call.

    Args:
        model: As it is trained.
        what: Who would not call it.

    Raises:
        BadInputError: There is such a hook.
    """
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise BadInputError(f"{name} has a hook on its gradient, which {what} would not call")


def hooked(module: nn.Module) -> bool:
    """Whether it has hooks around its forward or backward pass, as old spectral norms have.

    Whoever computes in its place would not call them.
    """
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with modules of its own that shares the model's parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: nn.Module = copy.deepcopy(model, cast(dict[int, Any], shared))
    return twin


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that dotted name, which is not ""."""
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, module)


def replace_children(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put others in the place of a module's children; gives how many.

    Args:
        module: It is changed; what is in its children is not.
        make: Gives what takes a child's place, or None to leave it there.
    """
    made = {name: make(child) for name, child in module.named_children()}
    found = {name: other for name, other in made.items() if other is not None}
    for name, other in found.items():
        setattr(module, name, other)
    return len(found)
