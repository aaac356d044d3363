"""A captured fp32 graph brought to a lower precision, checked by running it once.

The graph was traced in fp32, so casts that the model makes on purpose ("compute this norm in fp32")
are there, while casts back to the input's dtype are written as casts to fp32. They are all kept:
what comes after stays fp32 until the next matrix product brings it down. The result is at least as
precise as the user's own `model.to(dtype)`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from suanli.base.errors import SuanliError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
    "fp8": torch.bfloat16,
}

# What runs on matrix units and wants all its operands in one dtype.
_MATRIX = frozenset(
    [
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "mv",
        "addmv",
        "einsum",
        "bilinear",
        "convolution",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "scaled_dot_product_attention",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    ]
)


def operator_name(node: fx.Node) -> str:
    """ATen name without namespace and overload, such as "conv2d"; "" for what is no operator."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return ""


def module_path(node: fx.Node) -> str:
    """Path of the module that made the node, such as "layer1.0.conv1"; "" where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        return str(path).removeprefix("L['self'].").removeprefix("L['self']")
    return ""


class PrecisionPass:
    """Rewrites a flat graph so that its matrix products run in `dtype`."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        dtype: torch.dtype,
        *,
        keep: Sequence[str] = (),
        channels_last: bool = False,
    ) -> None:
        """Prepare.

        Args:
            graph_module: Flat module in evaluation mode; changed in place by `run`.
            dtype: What the matrix products run in.
            keep: Operators left in fp32: a node's name, an ATen name, or a module path (with all
                that is in it).
            channels_last: Whether 4-D inputs and convolution weights get that layout.
        """
        self._module = graph_module
        self._graph = graph_module.graph
        self._dtype = dtype
        self._keep = tuple(keep)
        self._channels_last = channels_last
        self._values: dict[fx.Node, Any] = {}

    def run(self, flat: Sequence[torch.Tensor]) -> None:
        """Rewrite the graph while computing it on an example.

        Raises:
            SuanliError: An operator cannot be computed in this precision; it is named.
        """
        if self._dtype == torch.float32 and not self._channels_last:
            return
        tensors = iter(flat)
        waiting = {node: len(node.users) for node in self._graph.nodes}
        with torch.no_grad():
            for node in list(self._graph.nodes):
                if node.op == "placeholder":
                    self._input(node, next(tensors))
                elif node.op == "get_attr":
                    self._constant(node)
                elif node.op == "output":
                    self._output(node)
                else:
                    self._operator(node)
                self._forget(node, waiting)

    def _forget(self, node: fx.Node, waiting: dict[fx.Node, int]) -> None:
        for used in node.all_input_nodes:
            if used in waiting:
                waiting[used] -= 1
                if waiting[used] <= 0:
                    self._values.pop(used, None)

    def _input(self, node: fx.Node, tensor: torch.Tensor) -> None:
        self._values[node] = tensor
        if not tensor.is_floating_point():
            return
        last = node
        if self._channels_last and tensor.dim() == 4:
            last = self._after(
                last,
                torch.ops.aten.contiguous.default,
                {"memory_format": torch.channels_last},
                tensor.contiguous(memory_format=torch.channels_last),
            )
        if tensor.dtype == torch.float32 != self._dtype:
            self._after(
                last, torch.ops.aten.to.dtype, self._dtype, self._values[last].to(self._dtype)
            )

    def _after(self, node: fx.Node, target: Any, how: Any, value: torch.Tensor) -> fx.Node:
        """Insert an operator on `node`; all earlier users take its result."""
        args, kwargs = ((node,), how) if isinstance(how, dict) else ((node, how), {})
        with self._graph.inserting_after(node):
            new = self._graph.call_function(target, args, kwargs)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._values[new] = value
        return new

    def _constant(self, node: fx.Node) -> None:
        value = self._module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            self._values[node] = value
            return
        kept = bool(node.users) and all(self._is_kept(user) for user in node.users)
        new = value.detach()
        if new.dtype == torch.float32 and not kept:
            new = new.to(self._dtype)
        if self._channels_last and new.dim() == 4 and _is_conv_weight(node):
            new = new.contiguous(memory_format=torch.channels_last)
        if new is not value:
            name = f"suanli_{len(self._module._buffers)}_{node.name}"
            self._module.register_buffer(name, new)
            node.meta["suanli_path"] = node.target
            node.target = name
        self._values[node] = new

    def _is_kept(self, node: fx.Node) -> bool:
        path = module_path(node)
        return any(
            name in (node.name, operator_name(node), path) or path.startswith(f"{name}.")
            for name in self._keep
        )

    def _operator(self, node: fx.Node) -> None:
        if self._is_kept(node):
            self._cast_operands(node, torch.float32)
        elif operator_name(node) in _MATRIX:
            self._cast_operands(node, self._dtype)
        original = (node.target, node.args, node.kwargs)
        first: Exception | None = None
        for attempt in self._attempts(node):
            node.target, node.args, node.kwargs = original
            if attempt is not None:
                attempt(node)
            try:
                self._values[node] = self._compute(node)
            except (RuntimeError, TypeError, ValueError) as error:
                first = first or error
                continue
            return
        reason = str(first).strip().splitlines()[0] if str(first).strip() else repr(first)
        name = operator_name(node) or str(node.target)
        raise SuanliError(
            f"{name} cannot be computed in {str(self._dtype).removeprefix('torch.')}: {reason}",
            next_step="try the option autocast",
        )

    def _attempts(self, node: fx.Node) -> Iterator[Any]:
        yield None
        if operator_name(node) == "view":
            # a view of channels-last memory may need a copy
            yield lambda n: setattr(n, "target", torch.ops.aten.reshape.default)
        yield lambda n: self._cast_operands(n, self._dtype)
        yield lambda n: self._cast_operands(n, torch.float32)

    def _compute(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))(*args, **kwargs)
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)

    def _cast_operands(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Bring every fp32 or low-precision operand to `dtype`, but what is written in place."""
        written = node.args[0] if _writes_first(node) else None
        masks = _attention_mask(node)

        def cast(operand: fx.Node) -> Any:
            value = self._values[operand]
            if operand is written or not isinstance(value, torch.Tensor):
                return operand
            if value.dtype == dtype or value.dtype not in (torch.float32, self._dtype):
                return operand
            with self._graph.inserting_before(node):
                if operand in masks and dtype != torch.float32:
                    # fp32's lowest number is minus infinity in bf16, and a row of these gives NaN
                    low = torch.finfo(dtype).min
                    operand = self._graph.call_function(
                        torch.ops.aten.clamp.default, (operand, low)
                    )
                    value = self._values[operand] = value.clamp(low)
                new = self._graph.call_function(torch.ops.aten.to.dtype, (operand, dtype))
            self._values[new] = value.to(dtype)
            return new

        node.args = fx.map_arg(node.args, cast)
        node.kwargs = fx.map_arg(node.kwargs, cast)

    def _output(self, node: fx.Node) -> None:
        """Give fp32 back, in plain memory."""
        outputs = []
        for leaf in node.args[0]:  # type: ignore[union-attr]
            assert isinstance(leaf, fx.Node)
            value, last = self._values[leaf], leaf
            with self._graph.inserting_before(node):
                if value.dtype == self._dtype != torch.float32:
                    last = self._graph.call_function(torch.ops.aten.to.dtype, (last, torch.float32))
                if not value.is_contiguous():
                    last = self._graph.call_function(torch.ops.aten.contiguous.default, (last,))
            outputs.append(last)
        node.args = (tuple(outputs),)


def _is_conv_weight(node: fx.Node) -> bool:
    return any(
        operator_name(user).startswith("conv") and len(user.args) > 1 and user.args[1] is node
        for user in node.users
    )


def _writes_first(node: fx.Node) -> bool:
    with suppress(AttributeError, IndexError):
        alias = node.target._schema.arguments[0].alias_info  # type: ignore[union-attr]
        return bool(alias is not None and alias.is_write)
    return False


def _attention_mask(node: fx.Node) -> tuple[Any, ...]:
    if operator_name(node) != "scaled_dot_product_attention":
        return ()
    return (node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"),)
