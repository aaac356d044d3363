"""Fused layers take in what a `forward` does behind them: a shortcut, an activation, a pool.

Many a network adds, activates and pools in Python, where no list of layers shows it. Each block
that holds fused layers is traced with its layers as they are (torch.fx); one whose `forward` cannot
be traced stays as it was.
"""

import operator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn
from torch.nn import functional

from suanli.training.activations import activation_kind
from suanli.training.chance import chance_watched
from suanli.training.twin import hooked

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_ACTIVATIONS: dict[tuple[str, Any], type[nn.Module]] = {
    ("call_function", functional.relu): nn.ReLU,
    ("call_function", torch.relu): nn.ReLU,
    ("call_function", functional.silu): nn.SiLU,
    ("call_method", "relu"): nn.ReLU,
    ("call_method", "relu_"): nn.ReLU,
}


_POOLS = (functional.max_pool2d, torch.max_pool2d)


@runtime_checkable
class Joinable(Protocol):
    """A layer that can take in what comes behind it.

    Attributes:
        takes_shortcut: Whether it can be called with a second tensor, which it adds to its result
            before the activation.
    """

    takes_shortcut: bool

    def joins(self, layer: nn.Module) -> bool:
        """Take in a layer that comes behind, if it can; says whether it did."""


class _Layers(fx.Tracer):
    """Sees the calls of layers, not what is in them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def join_blocks(model: nn.Module) -> nn.Module:
    """Join what can be joined in the model and every block of it.

    Args:
        model: With fused layers in it; its blocks are changed.

    Returns:
        What takes the model's place: itself, unless its own `forward` was joined.
    """
    for name, child in list(model.named_children()):
        joined = join_blocks(child)
        if joined is not child:
            setattr(model, name, joined)
    if isinstance(model, nn.Sequential) or not any(
        isinstance(m, Joinable) for m in model.children()
    ):
        return model
    if hooked(model):  # what is traced is its forward alone
        return model
    return _joined(model)


def _joined(block: nn.Module) -> nn.Module:
    with chance_watched() as drew:
        try:
            graph = _Layers().trace(block)
        except Exception:  # its Python asks for values, which a trace has not
            return block
        if drew():  # what was drawn now would hold for the whole run
            return block
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    count = 0
    for node in calls:
        layer = block.get_submodule(str(node.target))
        # one that is called twice cannot end in two ways
        if isinstance(layer, Joinable) and targets.count(node.target) == 1:
            count += _take_in(graph, node, layer, block)
    if not count:
        return block
    graph.lint()
    return fx.GraphModule(block, graph)


def _take_in(graph: fx.Graph, node: fx.Node, layer: Joinable, block: nn.Module) -> int:
    """Join a layer with an addition and other layers behind it; gives whether there were any."""
    taken, added = list[fx.Node](), None
    after = _only_user(node)
    if after is not None and layer.takes_shortcut:
        added = _other_operand(after, node)
        if added is not None:
            taken.append(after)
            after = _only_user(after)
    while after is not None:
        found = _activation(after, block) or _pool(after, block)
        if found is None or not layer.joins(found):
            break
        taken.append(after)
        after = _only_user(after)
    if not taken:
        return 0
    with graph.inserting_after(taken[-1]):
        args = (node.args[0],) if added is None else (node.args[0], added)
        made = graph.call_module(str(node.target), args)
    taken[-1].replace_all_uses_with(made)
    for gone in (*reversed(taken), node):
        graph.erase_node(gone)
    return 1


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _other_operand(after: fx.Node, node: fx.Node) -> fx.Node | None:
    """What an addition of two values adds to this one; None where it is no such addition."""
    function = after.op == "call_function" and after.target in _ADDITIONS
    method = after.op == "call_method" and after.target in ("add", "add_")
    if not (function or method) or after.kwargs or len(after.args) != 2:
        return None
    others = [value for value in after.args if value is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _activation(node: fx.Node, block: nn.Module) -> nn.Module | None:
    """A layer that does what the node does, where it is an activation that the kernels have."""
    if node.op == "call_module":
        found = block.get_submodule(str(node.target))
        return found if activation_kind(found) else None
    kind = _ACTIVATIONS.get((node.op, node.target))
    plain = len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}
    return kind() if kind is not None and plain else None


def _pool(node: fx.Node, block: nn.Module) -> nn.MaxPool2d | None:
    """A max-pool that does what the node does, where it is one."""
    if node.op == "call_module":
        found = block.get_submodule(str(node.target))
        return found if type(found) is nn.MaxPool2d else None
    if node.op != "call_function" or node.target not in _POOLS:
        return None
    try:
        return nn.MaxPool2d(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    except TypeError:
        return None
