"""Finds the parts of a step that somebody else wrote, without changing it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from suanli.profiling.stopwatch import Mark


def marked(step: Callable[[], object], model: nn.Module | None) -> Callable[[Mark], object]:
    """The step, telling when a part begins.

    The forward pass begins at the model's first call, the backward pass at `Tensor.backward` or
    `torch.autograd.backward`, the update at an optimiser's `step`; after an update comes what
    belongs to the next batch. A step without these is all forward.
    """

    def run(mark: Mark) -> object:
        with ExitStack() as stack:
            if model is not None:
                entered = model.register_forward_pre_hook(lambda *_: mark("forward"))
                stack.callback(entered.remove)
            stack.enter_context(_backward_marked(mark))
            begun = register_optimizer_step_pre_hook(lambda *_: mark("optimizer"))
            stack.callback(begun.remove)
            return step()

    return run


@contextmanager
def _backward_marked(mark: Mark) -> Iterator[None]:
    """Watch the two calls that start a backward pass while a step runs."""
    plain = torch.autograd.backward

    def watched(*args: Any, **kwargs: Any) -> None:
        mark("backward")
        plain(*args, **kwargs)

    torch.autograd.backward = watched
    try:
        yield
    finally:
        torch.autograd.backward = plain
