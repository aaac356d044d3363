"""Averages of weights that follow a run."""

from typing import Any

import torch
from torch import Tensor, nn


class Lookahead:
    """Slow weights that the model is pulled back to every few steps.

    Every `every` steps the slow weights move towards the model's by a share of `1 - decay(done)`,
    and the model takes their place. With `decay` rising to its end over the run this is the
    lookahead of airbench94: slow at the end, hardly there at the beginning.

    Args:
        model: Its floating-point state (running statistics too) is averaged, in place.
        every: Steps between two meetings.
        decay: What is kept at the end of the run, for one meeting.
        power: How late it rises: decay(done) = decay * done ** power.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 5, decay: float = 0.95**5, power: float = 3.0
    ) -> None:
        self._every, self._decay, self._power = every, decay, power
        self._own = _floating(model)
        self._slow = {name: tensor.clone() for name, tensor in self._own.items()}

    @torch.no_grad()
    def after_step(self, step: int, done: float) -> None:
        """Let the two meet, where `step` (from 1) is a multiple of `every`."""
        if step % self._every == 0:
            self._meet(self._decay * done**self._power)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the slow weights in the model."""
        self._meet(1.0)

    def state_dict(self) -> dict[str, Any]:
        """The slow weights by name."""
        return {"slow": dict(self._slow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, tensor in state["slow"].items():
            self._slow[name].copy_(tensor)

    def _meet(self, kept: float) -> None:
        slow, own = list(self._slow.values()), list(self._own.values())
        torch._foreach_lerp_(slow, own, 1.0 - kept)
        torch._foreach_copy_(own, slow)


class ExponentialAverage:
    """An exponential moving average beside the model, put into it at the end.

    Args:
        model: Its floating-point state is averaged.
        decay: What is kept of the average at each step.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        self._decay = decay
        self._own = _floating(model)
        self._average = {name: tensor.clone() for name, tensor in self._own.items()}

    @torch.no_grad()
    def after_step(self, step: int, done: float) -> None:
        """Take in the weights; early steps weigh more, so that the start is forgotten."""
        kept = min(self._decay, step / (step + 9.0))
        torch._foreach_lerp_(list(self._average.values()), list(self._own.values()), 1.0 - kept)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the average into the model."""
        torch._foreach_copy_(list(self._own.values()), list(self._average.values()))

    def state_dict(self) -> dict[str, Any]:
        """The average by name."""
        return {"average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, tensor in state["average"].items():
            self._average[name].copy_(tensor)


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=False).items()
        if tensor.is_floating_point()
    }
