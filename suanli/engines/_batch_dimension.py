"""Which dimension of each output is the batch: what the export says, never a size that fits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError, CaptureError
from suanli.workloads.record import Inputs

_OTHER = -2  # a size that depends on the batch and is not the batch


def marked(tensor: torch.Tensor, batch: int) -> tuple[int, ...]:
    """A tensor's shape, the first dimension -1 where it has as many entries as the batch."""
    shape = tuple(int(size) for size in tensor.shape)
    return (-1, *shape[1:]) if shape and shape[0] == batch else shape


def output_shapes(
    model: nn.Module,
    inputs: Inputs,
    batch: int,
    results: Sequence[torch.Tensor],
    exported: torch.export.ExportedProgram | None,
) -> list[tuple[int, ...]]:
    """The shapes of a model's outputs for any batch, -1 for the batch.

    A state of a network of two layers, [2, B, H], captured at two samples has the batch's size in
    its first dimension by chance. The exported graph has a symbol for the batch; without one the
    model is run at one sample more.

    Args:
        model: In evaluation mode.
        inputs: A call of it.
        batch: Samples in the call.
        results: The tensors of its result.
        exported: The graph with a free batch, or None.

    Raises:
        CaptureError: An output's size depends on the batch in another way than by one dimension
            that is the batch.
    """
    shapes = None
    if exported is not None:
        shapes = _symbolic(exported)
    if shapes is None or len(shapes) != len(results):
        shapes = _by_running(model, inputs, batch, results)
    for index, shape in enumerate(shapes):
        if _OTHER in shape or shape.count(-1) > 1:
            sizes = [{-1: "batch", _OTHER: "?"}.get(size, str(size)) for size in shape]
            raise CaptureError(
                f"output{index} is [{', '.join(sizes)}]: its size depends on the batch in another "
                "way than one row per sample",
                next_step="return one row per sample, or give a Workload with dynamic_batch=False "
                "for one fixed batch",
            )
    return shapes


def _symbolic(exported: torch.export.ExportedProgram) -> list[tuple[int, ...]] | None:
    """From the graph's symbols; None where it does not say."""
    nodes = {node.name: node for node in exported.graph.nodes}
    signature = exported.graph_signature
    symbols = {
        size.node.expr
        for name in signature.user_inputs
        if isinstance(name, str) and isinstance(nodes[name].meta.get("val"), torch.Tensor)
        for size in nodes[name].meta["val"].shape[:1]
        if isinstance(size, torch.SymInt)
    }
    if len(symbols) != 1:
        return None
    (symbol,) = symbols

    def plain(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        return -1 if expression == symbol else _OTHER

    shapes = []
    for name in signature.user_outputs:
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        if isinstance(value, torch.Tensor):
            shapes.append(tuple(plain(size) for size in value.shape))
    return shapes


def _by_running(
    model: nn.Module, inputs: Inputs, batch: int, results: Sequence[torch.Tensor]
) -> list[tuple[int, ...]]:
    """From a call with one sample more; as many entries as samples count where it cannot run."""

    def longer(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return torch.cat([leaf, leaf[:1]])
        return leaf

    args, kwargs = pytree.tree_map(longer, (tuple(inputs.args), dict(inputs.kwargs)))
    try:
        with torch.inference_mode():
            other = model(*args, **kwargs)
    except Exception:  # whatever a model raises that was written for one size
        return [marked(tensor, batch) for tensor in results]
    more = [leaf for leaf in pytree.tree_leaves(other) if isinstance(leaf, torch.Tensor)]
    if [t.dim() for t in more] != [t.dim() for t in results]:
        raise CaptureError("the number of outputs or of their dimensions depends on the batch")
    return [
        tuple(
            int(now) if now == then else -1 if (now, then) == (batch, batch + 1) else _OTHER
            for now, then in zip(tensor.shape, longer_tensor.shape, strict=True)
        )
        for tensor, longer_tensor in zip(results, more, strict=True)
    ]


def check_first_dimensions(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Refuse inputs whose first dimensions differ, where all are to be the batch.

    Args:
        names: One per leaf.
        leaves: The leaves of a call; numbers and tensors without dimensions are left out.

    Raises:
        BadInputError: Two differ; the message names them all.
    """
    shapes = {
        name: list(leaf.shape)
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.dim()
    }
    if len({shape[0] for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise BadInputError(
            f"the inputs have different first dimensions: {listed}; the first dimension of every "
            "input is the batch",
            next_step="keep what is no sample in the model, as a buffer, or give a Workload with "
            "dynamic_batch=False",
        )
