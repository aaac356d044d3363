"""Pruning by magnitude while training: zeros that stay zero, so that fine-tuning works around them.

"2:4" keeps the two largest of every four weights along a filter's inputs, the pattern that sparse
tensor cores multiply (NVIDIA Ampere architecture whitepaper, "fine-grained structured sparsity"); a
fraction drops the smallest weights of all layers together.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.training.recipe import Averaging, Recipe

TWO_OF_FOUR = "2:4"


class Masks:
    """Keeps pruned weights at zero; takes the place of a recipe's `averaging`, or wraps it."""

    def __init__(self, model: nn.Module, kind: str, inner: Averaging | None = None) -> None:
        """Choose what is dropped from the model's present weights, and drop it.

        Args:
            model: Its convolutions and dense layers are pruned, the last of them left out.
            kind: "2:4", or a fraction such as "0.8".
            inner: An average that is kept as well, of the pruned weights.

        Raises:
            BadInputError: The kind is unknown, or nothing in the model can be pruned so.
        """
        self._inner = inner
        self._weights = _prunable(model, kind)
        make = _two_of_four if kind == TWO_OF_FOUR else _by_threshold(self._weights, kind)
        with torch.no_grad():
            self._masks = {name: make(weight) for name, weight in self._weights.items()}
        self._apply()

    @property
    def sparsity(self) -> float:
        """Share of the pruned layers' weights that is zero."""
        total = sum(mask.numel() for mask in self._masks.values())
        kept = sum(int(mask.sum()) for mask in self._masks.values())
        return 1.0 - kept / total

    def after_step(self, step: int, done: float) -> None:
        """Drop again what the update brought back."""
        self._apply()
        if self._inner is not None:
            self._inner.after_step(step, done)

    def finish(self) -> None:
        """Finish the inner average; its weights are pruned too."""
        if self._inner is not None:
            self._inner.finish()
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The masks, and the inner average."""
        inner = self._inner.state_dict() if self._inner is not None else {}
        return {"masks": dict(self._masks), "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the masks of a run."""
        for name, mask in state["masks"].items():
            self._masks[name] = mask.to(self._weights[name].device)
        if self._inner is not None:
            self._inner.load_state_dict(state["inner"])
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for name, weight in self._weights.items():
            weight.mul_(self._masks[name])


def pruned(recipe: Recipe, kind: str) -> Recipe:
    """The recipe with pruning from its start on.

    Raises:
        BadInputError: The kind is unknown.
    """
    _fraction(kind)
    inner = recipe.averaging

    def averaging(model: nn.Module) -> Averaging:
        return Masks(model, kind, inner(model) if inner is not None else None)

    words = "2:4 pruning" if kind == TWO_OF_FOUR else f"{kind} of the weights pruned"
    changes = "; ".join(part for part in (recipe.changes, words) if part)
    return replace(recipe, averaging=averaging, changes=changes)


def _fraction(kind: str) -> float:
    if kind == TWO_OF_FOUR:
        return 0.5
    try:
        value = float(kind)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise BadInputError(f"cannot prune by {kind!r}", next_step="2:4, or a fraction such as 0.8")
    return value


def _prunable(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d)
    ][:-1]  # the last one makes the answer
    found = {
        f"{name}.weight": module.weight for name, module in layers if module.weight is not None
    }
    if kind == TWO_OF_FOUR:
        found = {n: w for n, w in found.items() if w[0].numel() % 4 == 0}
    if not found:
        raise BadInputError(f"no layer of the model can be pruned by {kind}")
    return found


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Mask of the two largest in each group of four along the inputs, [O, I, …]."""
    flat = weight.detach().movedim(1, -1).flatten(1)  # inputs next to each other
    groups = flat.abs().reshape(len(flat), -1, 4)
    best = groups.topk(2, dim=-1).indices
    mask = torch.zeros_like(groups).scatter_(-1, best, 1.0)
    shape = weight.movedim(1, -1).shape
    return mask.reshape(shape).movedim(-1, 1).contiguous()


def _by_threshold(
    weights: dict[str, torch.Tensor], kind: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mask of the largest of all layers together."""
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    dropped = int(_fraction(kind) * len(sizes))
    edge = sizes.kthvalue(max(dropped, 1)).values

    def mask(weight: torch.Tensor) -> torch.Tensor:
        return (weight.detach().abs() > edge).to(weight.dtype)

    return mask
