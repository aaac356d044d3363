"""From a module in a person's own program, with example inputs, to a workload."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError
from suanli.workloads.admission import check_inputs, unwrapped
from suanli.workloads.record import Inputs, Workload


def of_module(model: nn.Module, inputs: Any) -> Workload:
    """A workload around a module that lives only in this process.

    Args:
        model: In evaluation mode; taken out of `torch.compile` or `DataParallel` around it.
        inputs: One tensor, a tuple of positional arguments, a dictionary of keyword arguments, or
            `Inputs`.

    Raises:
        BadInputError: There are no inputs, or of another kind, or they hold no sample.
    """
    model = unwrapped(model)
    if isinstance(inputs, Inputs):
        given = inputs
    elif isinstance(inputs, torch.Tensor):
        given = Inputs(args=(inputs,))
    elif isinstance(inputs, dict):
        given = Inputs(kwargs=inputs)
    elif isinstance(inputs, tuple | list):
        given = Inputs(args=tuple(inputs))
    else:
        raise BadInputError(
            "a module needs example inputs",
            next_step="a tensor, a tuple of arguments or a dictionary of keyword arguments",
        )
    check_inputs(given)
    return Workload(
        name=type(model).__name__,
        make_model=lambda: model,
        make_inputs=_repeater(given),
        untrained=False,
    )


def _repeater(given: Any) -> Callable[[int], Any]:
    """Batch size -> the given inputs, repeated or cut along the first dimension."""
    sizes = {
        leaf.shape[0]
        for leaf in pytree.tree_leaves((given.args, dict(given.kwargs)))
        if isinstance(leaf, torch.Tensor) and leaf.dim()
    }
    present = sizes.pop() if len(sizes) == 1 else None

    def cut(leaf: Any, batch: int) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != present:
            return leaf
        times = -(-batch // max(leaf.shape[0], 1))
        return leaf.repeat(times, *[1] * (leaf.dim() - 1))[:batch].contiguous()

    def make_inputs(batch: int) -> Inputs:
        args, kwargs = pytree.tree_map(lambda x: cut(x, batch), (given.args, dict(given.kwargs)))
        return Inputs(args=tuple(args), kwargs=kwargs)

    return make_inputs
