"""The exported graph made ready for a plan: flat, free of noise, folded, in the plan's precision.

Every torch backend starts from `flat_module`, so that they all compute the same thing and differ
only in who runs it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from suanli.base.plan import Plan
from suanli.engines.backends._precision import DTYPES, PrecisionPass, operator_name
from suanli.engines.program import Program

_FOLDABLE = ("conv1d", "conv2d", "conv3d")


def flat_module(program: Program, plan: Plan) -> fx.GraphModule:
    """The program as the plan wants it computed.

    Inputs and outputs keep the signature's dtypes, whatever the precision inside. Batch
    normalisation is folded into the convolution before it in fp32, so that a folded weight is
    rounded once.

    Args:
        program: The captured model.
        plan: Its `device`, `precision`, `memory_layout`, `float_operators` and the option
            "autocast" are used; under "autocast" the weights stay fp32.

    Returns:
        A module that takes the signature's tensors, flat, and gives a tuple of the outputs.

    Raises:
        CaptureError: The model has no exported program.
        SuanliError: The graph cannot be computed in this precision.
    """
    exported = program.exported_module()
    assert isinstance(exported, fx.GraphModule)
    # a new module leaves behind the hook that checks a tree of arguments at every call
    graph_module = fx.GraphModule(exported, exported.graph)
    _flatten(graph_module, program)
    _drop_noise(graph_module)
    fold_batch_norm(graph_module)
    _move(graph_module, plan.device)
    dtype = torch.float32 if plan.options.get("autocast") else DTYPES[plan.precision]
    channels_last = plan.memory_layout == "channels_last"
    precision = PrecisionPass(
        graph_module, dtype, keep=plan.float_operators, channels_last=channels_last
    )
    precision.run([tensor.to(plan.device) for tensor in program.inputs(program.meta.batch)])
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.requires_grad_(False)


def constant_outputs(graph_module: fx.GraphModule) -> frozenset[int]:
    """Positions of the outputs that depend on no input, which a compiler may give twice."""
    live: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or any(arg in live for arg in node.all_input_nodes):
            live.add(node)
    (outputs,) = graph_module.graph.output_node().args
    assert isinstance(outputs, Sequence)
    return frozenset(i for i, node in enumerate(outputs) if node not in live)


def attribute(root: nn.Module, path: str) -> Any:
    """The parameter, buffer or module at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def replace_tensor(root: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a tensor at a dotted path, as the parameter or buffer that was there."""
    owner_path, _, name = path.rpartition(".")
    owner = attribute(root, owner_path) if owner_path else root
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, value)


def _flatten(graph_module: fx.GraphModule, program: Program) -> None:
    """Take the tensors alone, in order, and give the tensors alone: no trees in the hot path."""
    graph = graph_module.graph
    static = program.signature.static_inputs
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if position in static:
            _put_constant(node, static[position])
            graph.erase_node(node)
    output = graph.output_node()
    leaves = torch.utils._pytree.tree_leaves(output.args[0])
    output.args = (tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node)),)
    graph.set_codegen(fx.graph.CodeGen())


def _put_constant(node: fx.Node, value: Any) -> None:
    def put(used: fx.Node) -> Any:
        return value if used is node else used

    for user in list(node.users):
        user.args = fx.map_arg(user.args, put)
        user.kwargs = fx.map_arg(user.kwargs, put)


def _drop_noise(graph_module: fx.GraphModule) -> None:
    """Remove what computes nothing in inference: checks of dtypes, dropout, aliases.

    The dtype checks must go because the precision changes; sizes stay guarded by the signature.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        name = operator_name(node)
        if name == "_assert_tensor_metadata":
            graph.erase_node(node)
        elif name in ("dropout", "feature_dropout", "alpha_dropout") and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def fold_batch_norm(graph_module: fx.GraphModule) -> int:
    """Fold every batch normalisation that alone follows a convolution; gives how many."""
    folded = 0
    for node in list(graph_module.graph.nodes):
        if operator_name(node) == "batch_norm" and _fold_one(graph_module, node):
            folded += 1
    return folded


def _fold_one(graph_module: fx.GraphModule, norm: fx.Node) -> bool:
    conv, *statistics = norm.args[:5]
    training, eps = bool(norm.args[5]), float(str(norm.args[7]))
    if training or not isinstance(conv, fx.Node) or operator_name(conv) not in _FOLDABLE:
        return False
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    fixed = [*statistics, weight, bias]
    if len(conv.users) > 1 or any(n is not None and not _is_constant(n) for n in fixed):
        return False

    def value(node: Any) -> Any:
        # in double: each rounding of a folded weight is an error that every answer shares
        return None if node is None else attribute(graph_module, node.target).detach().double()

    scale, shift, mean, variance = (value(node) for node in statistics)
    if mean is None or variance is None:
        return False
    new_weight, new_bias = fuse_conv_bn_weights(
        value(weight), value(bias), mean, variance, eps, scale, shift
    )
    name = f"folded_{conv.name}"
    assert isinstance(weight, fx.Node)
    dtype = attribute(graph_module, str(weight.target)).dtype
    graph_module.register_parameter(f"{name}_weight", _frozen(new_weight.to(dtype)))
    graph_module.register_parameter(f"{name}_bias", _frozen(new_bias.to(dtype)))
    with graph_module.graph.inserting_before(conv):
        weight_node = graph_module.graph.get_attr(f"{name}_weight")
        bias_node = graph_module.graph.get_attr(f"{name}_bias")
    conv.args = (conv.args[0], weight_node, bias_node, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    graph_module.graph.erase_node(norm)
    return True


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _move(graph_module: fx.GraphModule, device: str) -> None:
    """Bring weights and the devices written into the graph to the plan's device."""
    if device == "cpu":
        return
    target = torch.device(device)
    for node in graph_module.graph.nodes:
        node.kwargs = {
            key: target if isinstance(value, torch.device) else value
            for key, value in node.kwargs.items()
        }
        node.args = tuple(
            target if isinstance(value, torch.device) else value for value in node.args
        )
        if node.op == "get_attr":
            value = attribute(graph_module, node.target)
            if isinstance(value, torch.Tensor) and value.device != target:
                replace_tensor(graph_module, node.target, value.to(target))
    graph_module.recompile()


def convolves(graph_module: fx.GraphModule) -> bool:
    """Whether the graph has a convolution."""
    return any(operator_name(node).startswith("conv") for node in graph_module.graph.nodes)
