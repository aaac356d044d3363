"""ONNX files, read with care.

A file names other files for large weights. A name that leads out of the model's folder, and a link,
are refused: reading such a file would hand out whatever it points to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from suanli.base.errors import BadInputError, CaptureError
from suanli.base.lazy import need
from suanli.workloads.importers.onnx_module import OnnxModule, onnx_module
from suanli.workloads.importers.onnx_operators import OPERATORS
from suanli.workloads.importers.onnx_types import known_type
from suanli.workloads.importers.onnx_value import Node

_INSTALL = "pip install 'suanli[cpu]'"
_STANDARD = ("", "ai.onnx")
_CHECKER_LIMIT_BYTES = 1 << 30
_ATTRIBUTE_GRAPHS = (5, 10)  # AttributeProto.GRAPH, GRAPHS


@dataclass(frozen=True, kw_only=True)
class OnnxInput:
    """An input of a graph; None in `shape` stands for a size that is free."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """A file's graph as plain data."""

    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    nodes: list[Node]
    constants: dict[str, NDArray[Any]]

    def module(self) -> OnnxModule:
        """The graph as a torch module in evaluation mode."""
        names = [item.name for item in self.inputs]
        return onnx_module(self.nodes, self.constants, names, list(self.outputs))


def read_onnx(path: Path) -> OnnxGraph:
    """Read and check a file.

    Raises:
        BadInputError: It is absent, damaged, or points to files that it must not.
        CaptureError: It uses an operator that the importer does not know.
        MissingBackendError: The package onnx is absent.
    """
    onnx = need("onnx", _INSTALL)
    decode_error = need("google.protobuf.message", _INSTALL).DecodeError
    if not path.is_file():
        raise BadInputError(f"no file {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (decode_error, OSError, ValueError) as error:
        raise BadInputError(f"{path.name} is no readable ONNX file: {_line(error)}") from None
    if not model.graph.node or not model.graph.output:
        raise BadInputError(f"{path.name} is no readable ONNX file: it holds no graph")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _refuse_unknown(model.graph)
    _load_external(model, path.parent)
    _check(onnx, model, path)
    return _plain(onnx, model, path)


def _check(onnx: Any, model: Any, path: Path) -> None:
    if path.stat().st_size > _CHECKER_LIMIT_BYTES or model.ByteSize() > _CHECKER_LIMIT_BYTES:
        return
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise BadInputError(f"{path.name} is no valid ONNX model: {_line(error)}") from None


def _refuse_unknown(graph: Any) -> None:
    for node in graph.node:
        name = _operator(node)
        if name not in OPERATORS and name != "Constant":
            raise CaptureError(
                f"ONNX operator {name} is not known to the importer",
                operator=name,
                next_step="export the model without it, or give the torch model as file.py:name",
            )


def _operator(node: Any) -> str:
    return str(node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}")


def _tensors(graph: Any) -> Iterable[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _load_external(model: Any, folder: Path) -> None:
    for tensor in _tensors(model.graph):
        if tensor.data_location != 1:  # TensorProto.EXTERNAL
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        place = _inside(folder, facts.get("location", ""))
        try:
            offset, length = int(facts.get("offset", 0)), int(facts.get("length", -1))
        except ValueError:
            raise BadInputError(f"weight {tensor.name} has no valid place") from None
        size = place.stat().st_size
        length = size - offset if length < 0 else length
        if offset < 0 or offset + length > size:
            raise BadInputError(f"{place.name} ends before weight {tensor.name}")
        with place.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.data_location = 0
        del tensor.external_data[:]


def _inside(folder: Path, location: str) -> Path:
    place = folder / location
    parts = Path(location).parts
    if not location or Path(location).is_absolute() or ".." in parts or "\\" in location:
        raise BadInputError(f"the model names weights at {location!r}, outside its folder: refused")
    steps = [folder.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    if any(step.is_symlink() for step in steps):
        raise BadInputError(f"the model names weights at {location!r}, which is a link: refused")
    if not place.is_file():
        raise BadInputError(f"the weights file {location} is not beside the model")
    if place.stat().st_nlink > 1:
        raise BadInputError(f"the weights file {location} has a second name elsewhere: refused")
    return place


def _plain(onnx: Any, model: Any, path: Path) -> OnnxGraph:
    graph = model.graph
    versions = {item.domain: item.version for item in model.opset_import}
    to_array = onnx.numpy_helper.to_array
    try:
        constants = {item.name: to_array(item) for item in graph.initializer}
        nodes = []
        for item in graph.node:
            node = _node(onnx, item, versions)
            if node.operator == "Constant":
                constants[node.outputs[0]] = _constant(onnx, node)
            else:
                nodes.append(node)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInputError(f"{path.name} has a damaged weight: {_line(error)}") from None
    inputs = tuple(_input(item) for item in graph.input if item.name not in constants)
    if not inputs:
        raise BadInputError(f"{path.name} takes no input")
    outputs = tuple(item.name for item in graph.output)
    return OnnxGraph(inputs=inputs, outputs=outputs, nodes=nodes, constants=constants)


def _node(onnx: Any, item: Any, versions: dict[str, int]) -> Node:
    attributes: dict[str, Any] = {}
    for attribute in item.attribute:
        if attribute.type in _ATTRIBUTE_GRAPHS:
            raise CaptureError(
                f"ONNX operator {item.op_type} holds a graph, which is not supported",
                operator=item.op_type,
            )
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = _python(onnx, value)
    return Node(
        operator=_operator(item),
        name=item.name,
        inputs=tuple(item.input),
        outputs=tuple(item.output),
        attributes=attributes,
        version=versions.get(item.domain, versions.get("", versions.get("ai.onnx", 0))),
    )


def _python(onnx: Any, value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, str | int | float):
        return value
    return [_python(onnx, item) for item in value]


def _constant(onnx: Any, node: Node) -> NDArray[Any]:
    kinds = {"value_int": "int64", "value_ints": "int64"}
    kinds |= {"value_float": "float32", "value_floats": "float32"}
    for name, value in node.attributes.items():
        if name == "value":
            array: NDArray[Any] = value
            return array
        if name in kinds:
            return np.asarray(value, dtype=kinds[name])
    raise CaptureError("ONNX operator Constant holds no number", operator="Constant")


def _input(item: Any) -> OnnxInput:
    kind = item.type.tensor_type
    dtype = known_type(kind.elem_type)
    if dtype is None:
        raise BadInputError(f"input {item.name} has an element type that torch does not have")
    shape = tuple(
        int(size.dim_value) if size.WhichOneof("value") == "dim_value" else None
        for size in kind.shape.dim
    )
    return OnnxInput(name=item.name, dtype=dtype, shape=shape)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
