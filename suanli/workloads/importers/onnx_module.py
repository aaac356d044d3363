"""An ONNX graph as a torch module: weights as parameters, operators run in the file's order."""

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from suanli.workloads.importers.naming import identifier, with_inputs
from suanli.workloads.importers.onnx_operators import apply
from suanli.workloads.importers.onnx_value import HOST_LIMIT, Call, Node, Value, host_array


class OnnxModule(nn.Module):
    """Runs the nodes of a graph in order.

    Make it with `onnx_module`, which gives `forward` the graph's own input names.
    """

    def __init__(
        self,
        nodes: list[Node],
        constants: dict[str, NDArray[Any]],
        inputs: list[str],
        outputs: list[str],
    ) -> None:
        super().__init__()
        self._nodes, self._inputs, self._outputs = nodes, inputs, outputs
        self._attributes: dict[str, str] = {}
        self._host: dict[str, Value] = {}
        for name, array in constants.items():
            self._register(name, array)
        self._last_use = _last_uses(nodes, outputs)

    def _register(self, name: str, array: NDArray[Any]) -> None:
        tensor = _tensor_of(array)
        small = array.ndim <= 1 and array.size <= HOST_LIMIT
        if small:
            numbers = host_array(array.ravel().tolist(), array.shape)
            self._host[name] = Value(host=numbers, dtype=tensor.dtype)
            if array.ndim == 0 or array.size == 0 or not tensor.is_floating_point():
                return  # a number or a shape, no weight
        attribute = identifier(name, set(self._attributes.values()))
        self._attributes[name] = attribute
        if tensor.is_floating_point():
            self.register_parameter(attribute, nn.Parameter(tensor))
        else:
            self.register_buffer(attribute, tensor)

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Outputs of the graph: one tensor, or a tuple where there are several."""
        values: dict[str, Value | None] = {"": None}
        values.update(self._constants())
        values.update(zip(self._inputs, (Value(tensor) for tensor in inputs), strict=True))
        for position, node in enumerate(self._nodes):
            call = Call(node, [values[name] for name in node.inputs])
            for name, value in zip(node.outputs, _as_values(apply(call)), strict=False):
                values[name] = value
            for name in self._last_use.get(position, ()):
                values.pop(name, None)  # its memory is free again
            values[""] = None
        results = tuple(cast(Value, values[name]).tensor for name in self._outputs)
        return results[0] if len(results) == 1 else results

    def _constants(self) -> dict[str, Value]:
        # fresh ones: a tensor that one run makes of them must not outlive it
        values = {name: Value(host=v.host, dtype=v.dtype) for name, v in self._host.items()}
        for name, attribute in self._attributes.items():
            tensor = getattr(self, attribute)
            known = self._host.get(name)
            values[name] = Value(tensor, None if known is None else known.host)
        return values


def onnx_module(
    nodes: list[Node],
    constants: dict[str, NDArray[Any]],
    inputs: list[str],
    outputs: list[str],
) -> OnnxModule:
    """A module whose `forward` takes the graph's inputs by position or by name.

    Args:
        nodes: In an order in which every input is known.
        constants: Initialisers by name.
        inputs: Names of the inputs that are no initialisers.
        outputs: Names of the outputs.

    Returns:
        The module, in evaluation mode.
    """
    build = with_inputs(OnnxModule, inputs)
    return build(nodes, constants, inputs, outputs).eval()


def _as_values(result: Any) -> list[Value | None]:
    items = list(result) if isinstance(result, list | tuple) else [result]
    return [Value(item) if isinstance(item, torch.Tensor) else item for item in items]


def _tensor_of(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # a type of ml_dtypes, which torch does not read
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def _last_uses(nodes: list[Node], outputs: list[str]) -> dict[int, list[str]]:
    last: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for name in (*node.inputs, *node.outputs):
            last[name] = position
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        if name and name not in outputs:
            uses.setdefault(position, []).append(name)
    return uses
