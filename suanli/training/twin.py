"""Copies of a model that compute in another way and train the model's own tensors."""

import copy
from typing import Any, cast

from torch import nn


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with modules of its own that shares the model's parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: nn.Module = copy.deepcopy(model, cast(dict[int, Any], shared))
    return twin


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that dotted name, which is not ""."""
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, module)
