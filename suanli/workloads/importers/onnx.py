"""ONNX models as workloads."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.workloads import reference
from suanli.workloads.examples import example_tensor
from suanli.workloads.importers.onnx_file import OnnxGraph, OnnxInput, read_onnx
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.reference import Options


def from_onnx(path: Path, options: Options) -> Workload:
    """A workload of an ONNX file, with example inputs of the shapes that it declares.

    Args:
        path: The file.
        options: Shapes without the batch, where the file leaves sizes free beside the batch.

    Raises:
        BadInputError: The file is absent, damaged or unsafe, or a size is not known.
        CaptureError: An operator is not known to the importer; it is named.
        MissingBackendError: The package onnx is absent.
    """
    path = path.resolve()
    graph = read_onnx(path)
    shapes = _sample_shapes(graph.inputs, options, path)
    free = all(item.shape[:1] == (None,) for item in graph.inputs)
    fixed = graph.inputs[0].shape[0] if graph.inputs[0].shape else 1
    return Workload(
        name=path.stem,
        ref=reference.write(str(path), options),
        make_model=partial(_make_model, path),
        make_inputs=partial(_make_inputs, graph.inputs, shapes, free, _vocabulary(graph)),
        untrained=False,
        dynamic_batch=free,
        max_batch=256 if free else (fixed or 1),
    )


def _make_model(path: Path) -> nn.Module:
    return read_onnx(path).module()


def _sample_shapes(
    inputs: tuple[OnnxInput, ...], options: Options, path: Path
) -> tuple[tuple[int, ...], ...]:
    """Shape of one sample per input."""
    if options.shapes:
        if len(options.shapes) != len(inputs):
            raise BadInputError(
                f"{path.name} takes {len(inputs)} inputs, not {len(options.shapes)}"
            )
        return options.shapes
    shapes = []
    for item in inputs:
        known = tuple(size for size in item.shape[1:] if size is not None)
        if len(known) != len(item.shape[1:]):
            raise BadInputError(
                f"{path.name}: input {item.name} leaves sizes free beside the batch",
                next_step="give them with --input-shape, such as 3x224x224",
            )
        shapes.append(known)
    return tuple(shapes)


def _vocabulary(graph: OnnxGraph) -> int:
    """Rows of the smallest table that an input looks up directly, or 2."""
    names = {item.name for item in graph.inputs}
    rows = [
        graph.constants[node.inputs[0]].shape[0]
        for node in graph.nodes
        if node.operator == "Gather"
        and node.inputs[0] in graph.constants
        and node.inputs[1] in names
    ]
    return int(min(rows, default=2))


def _make_inputs(
    inputs: tuple[OnnxInput, ...],
    shapes: tuple[tuple[int, ...], ...],
    free: bool,
    vocabulary: int,
    batch: int,
) -> Inputs:
    tensors = []
    for index, (item, shape) in enumerate(zip(inputs, shapes, strict=True)):
        count = batch if free or not item.shape or item.shape[0] is None else item.shape[0]
        name = str(item.dtype).removeprefix("torch.")
        mask = "mask" in item.name and not item.dtype.is_floating_point
        if mask:
            tensors.append(torch.ones((count, *shape), dtype=item.dtype))
        else:
            tensors.append(
                example_tensor(count, shape, name, vocabulary=vocabulary, seed=20_240 + index)
            )
    return Inputs(args=tuple(tensors))
