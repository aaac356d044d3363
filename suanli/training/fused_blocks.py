"""Fused norms take in what a block's `forward` does behind them: a shortcut, an activation.

A residual block adds and activates in Python, where no list of layers shows it. Each block that
holds fused norms is traced with its layers as they are (torch.fx); one whose `forward` cannot be
traced stays as it was.
"""

import operator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn
from torch.nn import functional

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_ACTIVATIONS: dict[tuple[str, Any], type[nn.Module]] = {
    ("call_function", functional.relu): nn.ReLU,
    ("call_function", torch.relu): nn.ReLU,
    ("call_function", functional.silu): nn.SiLU,
    ("call_method", "relu"): nn.ReLU,
    ("call_method", "relu_"): nn.ReLU,
}


@runtime_checkable
class Joinable(Protocol):
    """A norm that can take in what comes behind it."""

    pool: nn.Module | None
    activation: nn.Module | None

    def activate_with(self, activation: nn.Module) -> None:
        """Take in an activation."""


class _Layers(fx.Tracer):
    """Sees the calls of layers, not what is in them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def join_blocks(model: nn.Module) -> nn.Module:
    """Join what can be joined in the model and every block of it.

    Args:
        model: With fused norms in it; its blocks are changed.

    Returns:
        What takes the model's place: itself, unless its own `forward` was joined.
    """
    for name, child in list(model.named_children()):
        joined = join_blocks(child)
        if joined is not child:
            setattr(model, name, joined)
    if isinstance(model, nn.Sequential) or not _holds_norms(model):
        return model
    return _joined(model)


def _holds_norms(module: nn.Module) -> bool:
    return any(isinstance(m, Joinable) and m.activation is None for m in module.children())


def _joined(block: nn.Module) -> nn.Module:
    try:
        graph = _Layers().trace(block)
    except Exception:  # its Python asks for values, which a trace has not
        return block
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    count = 0
    for node in calls:
        norm = block.get_submodule(str(node.target))
        # one that is called twice cannot end in two ways
        if isinstance(norm, Joinable) and targets.count(node.target) == 1:
            count += _take_in(graph, node, norm, block)
    if not count:
        return block
    graph.lint()
    return fx.GraphModule(block, graph)


def _take_in(graph: fx.Graph, node: fx.Node, norm: Joinable, block: nn.Module) -> int:
    """Join a norm with an addition and an activation behind it, or with one of them."""
    after = _only_user(node)
    if norm.activation is not None or after is None:
        return 0
    end, added = None, None
    if norm.pool is None:
        added = _other_operand(after, node)
    if added is not None:
        end, after = after, _only_user(after)
    activation = None if after is None else _activation(after, block)
    if activation is not None:
        norm.activate_with(activation)
        end = after
    if end is None:
        return 0
    with graph.inserting_before(end):
        args = (node.args[0],) if added is None else (node.args[0], added)
        made = graph.call_module(str(node.target), args)
    end.replace_all_uses_with(made)
    graph.erase_node(end)
    for between in list(node.users):
        graph.erase_node(between)
    graph.erase_node(node)
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
        gelu = isinstance(found, nn.GELU) and found.approximate == "none"
        return found if type(found) in (nn.ReLU, nn.SiLU) or gelu else None
    kind = _ACTIVATIONS.get((node.op, node.target))
    plain = len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}
    return kind() if kind is not None and plain else None
