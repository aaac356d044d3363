"""What flows between the operators of an imported ONNX graph.

ONNX computes shapes with tensors; a graph that torch is to capture needs them as plain integers,
some of them symbolic. So every value has up to two faces: a tensor, and where it is small and known
to the host an array of Python numbers. An operator that only moves sizes about works on the second.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from suanli.base.errors import CaptureError

HOST_LIMIT = 256  # elements; larger arrays are data, not shapes
HostArray = NDArray[np.object_]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator call of the graph.

    Attributes:
        operator: ONNX name, with its domain in front where it is not the standard one.
        attributes: Values as Python numbers, strings, lists and numpy arrays.
        version: Of the operator set.
        results: How many outputs are asked for; a skipped one counts.
    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    version: int

    @property
    def results(self) -> int:
        """How many outputs are asked for; a skipped one counts."""
        return len(self.outputs)


class Value:
    """A tensor, an array of numbers on the host, or both of the same content."""

    def __init__(
        self,
        tensor: torch.Tensor | None = None,
        host: HostArray | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._tensor, self.host = tensor, host
        self.dtype: torch.dtype = tensor.dtype if tensor is not None else dtype or torch.int64

    @property
    def tensor(self) -> torch.Tensor:
        """The value as a tensor on the CPU, or where it already is."""
        if self._tensor is None:
            assert self.host is not None
            self._tensor = _to_tensor(self.host, self.dtype)
        return self._tensor

    @property
    def on_host(self) -> bool:
        """Whether there is a host array."""
        return self.host is not None


def _to_tensor(host: HostArray, dtype: torch.dtype) -> torch.Tensor:
    flat = list(host.ravel())
    if any(isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool) for item in flat):
        parts = [torch.scalar_tensor(item, dtype=dtype) for item in flat]
        return torch.stack(parts).reshape(host.shape)
    return torch.tensor(flat, dtype=dtype).reshape(host.shape)


def host_array(items: Any, shape: tuple[int, ...] | None = None) -> HostArray:
    """An object array of these items; symbolic integers stay what they are."""
    flat = list(items)
    array = np.empty(len(flat), dtype=object)
    for index, item in enumerate(flat):
        array[index] = item
    return array if shape is None else array.reshape(shape)


class Call:
    """The arguments of one operator call, in the form that the operator asks for."""

    def __init__(self, node: Node, inputs: Sequence[Value | None]) -> None:
        self.node, self.inputs = node, inputs

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Input `index` as it is.

        Raises:
            CaptureError: It is absent.
        """
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise self.error(f"lacks input {index}")
        return value

    def tensor(self, index: int) -> torch.Tensor:
        """Input `index` as a tensor."""
        return self.value(index).tensor

    def optional(self, index: int) -> torch.Tensor | None:
        """Input `index` as a tensor, or None where it is not given."""
        return self.tensor(index) if self.has(index) else None

    def scalar_or_tensor(self, index: int) -> Any:
        """A Python number where the input is one constant number, else the tensor."""
        value = self.value(index)
        if value.host is not None and value.host.ndim == 0:
            return value.host.item()
        return value.tensor

    def numbers(self, index: int) -> list[Any]:
        """Input `index` as a flat list of numbers, some perhaps symbolic.

        Raises:
            CaptureError: It is computed from data, so that it is known only at run time.
        """
        value = self.value(index)
        if value.host is None:
            raise self.error("takes a size that depends on the data")
        return list(value.host.ravel())

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""
        return self.node.attributes.get(name, default)

    def axes(self, index: int) -> list[int] | None:
        """The axes, which older operator sets keep in an attribute and newer ones in an input."""
        if self.has(index):
            return [int(axis) for axis in self.numbers(index)]
        axes = self.attribute("axes")
        return None if axes is None else [int(axis) for axis in axes]

    @property
    def all_on_host(self) -> bool:
        """Whether every input is known to the host, so that no tensor need be made."""
        given = [value for value in self.inputs if value is not None]
        return bool(given) and all(value.on_host for value in given)

    def error(self, problem: str) -> CaptureError:
        """An error that names the operator and its node."""
        node = self.node
        where = f" ({node.name})" if node.name else ""
        return CaptureError(
            f"ONNX operator {node.operator}{where} {problem}", operator=node.operator
        )


Result = torch.Tensor | Value | Sequence[torch.Tensor | Value | None]
Operator = Callable[[Call], Result]
Table = dict[str, Operator]


def on_host(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Operator:
    """An operator on host arrays, element by element, with broadcasting."""

    @functools.wraps(function)
    def operator(call: Call) -> Value:
        arrays = [value.host for value in call.inputs if value is not None]
        ufunc = np.frompyfunc(function, len(arrays), 1)
        result = ufunc(*arrays)
        array = result if isinstance(result, np.ndarray) else host_array([result], ())
        kind = dtype or next(value.dtype for value in call.inputs if value is not None)
        return Value(host=array, dtype=kind)

    return operator


def square_root(value: Any) -> Any:
    """Square root of a number, symbolic ones included."""
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat)
    return symbolic_float(value) ** 0.5 if symbolic else math.sqrt(value)


def symbolic_float(value: Any) -> Any:
    """A float, or a symbol for one."""
    return torch.sym_float(value)  # type: ignore[no-untyped-call]


def symbolic_int(value: Any) -> Any:
    """An integer, or a symbol for one."""
    return torch.sym_int(value)  # type: ignore[no-untyped-call]
