"""What a step changes before its update: kept, so that a step that fails leaves no trace."""

from typing import Any

import torch
from torch import nn

from suanli.training.batches import Place
from suanli.training.chance import generators

_Buffer = tuple[dict[str, torch.Tensor | None], str]  # where a module keeps it, and its name there


class Before:
    """The state before the step that goes on, but for weights and optimiser, which it leaves alone.

    The first step shows what has to be kept before each of the others: the buffers that it changed,
    and the generators, where it drew from one.

    Attributes:
        whole: Whether all steps so far are whole, or can be made so by `restore`.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        """Nothing is kept yet.

        Args:
            model: Whose buffers may move.
            device: Of the plan; its generator counts.
        """
        self._device, self.whole = device, True
        self._buffers: list[_Buffer] = [
            (module._buffers, name) for module in model.modules() for name in module._buffers
        ]
        self._copies: list[Any] = []  # tensors, and None where a buffer holds none
        self._forms: list[Any] = []  # of the copies
        self._draws, self._known = True, False
        self._chance: tuple[Any, ...] | None = None
        self._place: Place | None = None

    def keep(self, place: Place) -> None:
        """Before a step: remember what it may change.

        Args:
            place: Of its batch in the order of the data.
        """
        if self._draws:
            self._chance = generators(self._device)
        if self._buffers:
            now = self._now()
            forms = [_form(buffer) for buffer in now]
            if forms == self._forms and None not in forms:
                with torch.no_grad():
                    torch._foreach_copy_(self._copies, now)
            else:  # a forward may put another tensor in a buffer's place, or none
                self._copies = [None if b is None else b.detach().clone() for b in now]
                self._forms = forms
        self._place = place

    def drop(self) -> None:
        """Within a step: its update begins, behind which there is no way back."""
        self.whole = False

    def stands(self) -> None:
        """Behind a step: it is whole."""
        if not self._known:
            self._known = True
            self._draws = not _same(self._chance, generators(self._device))
            moved = [not _same(a, b) for a, b in zip(self._copies, self._now(), strict=True)]
            self._buffers = [b for b, found in zip(self._buffers, moved, strict=True) if found]
            self._copies, self._forms = [], []
        self._place = self._chance = None
        self.whole = True

    def restore(self) -> tuple[Place, tuple[Any, ...] | None] | None:
        """Put the buffers back that a step in hand has changed.

        Returns:
            Its batch's place, and the generators' states, None where it draws nothing; None where
            no step is in hand.
        """
        if self._place is None:
            return None
        with torch.no_grad():
            for (kept, name), copy in zip(self._buffers, self._copies, strict=True):
                buffer = kept.get(name)
                if buffer is not None and copy is not None and _form(buffer) == _form(copy):
                    buffer.copy_(copy)  # in place: a plan's twin of the model shares it
                else:
                    kept[name] = None if copy is None else copy.clone()
        found = self._place, self._chance
        self._place = self._chance = None
        return found

    def _now(self) -> list[Any]:
        return [kept.get(name) for kept, name in self._buffers]


def _form(buffer: torch.Tensor | None) -> Any:
    """What a copy must have in common with a buffer to take its values."""
    return None if buffer is None else (buffer.shape, buffer.dtype)


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, torch.Tensor):
        alike = _form(one) == _form(other) and one.device == other.device
        return alike and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
