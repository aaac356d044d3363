"""Modules whose inputs have names that are known only when a file is read."""

import inspect
import re
from typing import Any, TypeVar, cast

import torch
from torch import nn

Base = TypeVar("Base", bound=nn.Module)


def identifier(name: str, taken: set[str]) -> str:
    """A Python name like `name` that is not in `taken` and hides nothing of a module."""
    base = re.sub(r"\W", "_", name) or "value"
    if base[0].isdigit() or hasattr(nn.Module, base) or base in ("self", "run"):
        base = f"x_{base}"
    unique, count = base, 1
    while unique in taken:
        unique, count = f"{base}_{count}", count + 1
    return unique


def with_inputs(base: type[Base], names: list[str]) -> type[Base]:
    """A class like `base` whose `forward` takes these inputs, by position or name.

    `torch.export` and people read the signature, and `*args` tells neither of them anything.

    Args:
        base: Has a method `run(*inputs)`.
        names: Of the inputs, in order; made into Python names.
    """
    known: list[str] = []
    for name in names:
        known.append(identifier(name, set(known)))

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        missing = known[len(args) :]
        return self.run(*args, *(kwargs[name] for name in missing))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ["self", *known]]
    cast(Any, forward).__signature__ = inspect.Signature(parameters)
    return cast(type[Base], type(base.__name__, (base,), {"forward": forward}))
