"""Operators that move elements about without computing, and those that compute sizes."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from suanli.workloads.importers.onnx_value import (
    HOST_LIMIT,
    Call,
    HostArray,
    Result,
    Table,
    Value,
    host_array,
)


def _shape(call: Call) -> Result:
    value = call.value(0)
    sizes = list(value.host.shape if value.host is not None else value.tensor.shape)
    start, end = call.attribute("start", 0), call.attribute("end")
    return Value(host=host_array(sizes[start:end]), dtype=torch.int64)


def _size(call: Call) -> Result:
    return Value(host=host_array([math.prod(call.tensor(0).shape)], ()), dtype=torch.int64)


def _target_shape(sizes: list[Any], own: Any, keep_zero: bool) -> list[Any]:
    if keep_zero:
        return sizes
    # a zero means: the size of the input there
    return [
        own[index] if isinstance(size, int) and size == 0 else size
        for index, size in enumerate(sizes)
    ]


def _reshape(call: Call) -> Result:
    x = call.tensor(0)
    sizes = call.numbers(1) if call.has(1) else list(call.attribute("shape"))
    return x.reshape(_target_shape(sizes, x.shape, bool(call.attribute("allowzero", 0))))


def _flatten(call: Call) -> Result:
    x = call.tensor(0)
    axis = call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(axis).flatten(0, axis - 1) if axis < x.dim() else x.reshape(-1, 1)


def _transpose(call: Call) -> Result:
    x = call.tensor(0)
    return x.permute(call.attribute("perm") or list(reversed(range(x.dim()))))


def _concat(call: Call) -> Result:
    parts = [call.tensor(index) for index in range(len(call.inputs))]
    return torch.cat(parts, call.attribute("axis"))


def _split(call: Call) -> Result:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    sizes = call.numbers(1) if call.has(1) else call.attribute("split")
    if sizes is None:
        parts = call.attribute("num_outputs", call.node.results)
        sizes = -(-x.shape[axis] // parts)
    return list(torch.split(x, sizes, axis))


def _slice(call: Call) -> Result:
    x = call.tensor(0)
    for axis, start, end, step in _slices(call, x.dim()):
        before = [slice(None)] * axis
        if step < 0:
            x, window = _mirrored(x, axis, start, end, step)
            x = x[(*before, window)]
        else:
            x = x[(*before, slice(start, end, step))]
    return x


def _mirrored(
    x: torch.Tensor, axis: int, start: Any, end: Any, step: int
) -> tuple[torch.Tensor, slice]:
    # torch has no negative steps: turn the axis around
    size = x.shape[axis]
    start = min(start + size if start < 0 else start, size - 1)
    end = -1 if end < -size else (end + size if end < 0 else end)
    return x.flip(axis), slice(size - 1 - start, size - 1 - end, -step)


def _slices(call: Call, dimensions: int) -> list[tuple[int, Any, Any, int]]:
    if call.has(1):
        starts, ends = call.numbers(1), call.numbers(2)
        axes = call.numbers(3) if call.has(3) else list(range(len(starts)))
        steps = call.numbers(4) if call.has(4) else [1] * len(starts)
    else:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes") or list(range(len(starts))), [1] * len(starts)
    normal = [int(axis) % dimensions for axis in axes]
    return list(zip(normal, starts, ends, (int(step) for step in steps), strict=True))


def _gather(call: Call) -> Result:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    axis = axis % x.dim()
    indices = call.value(1)
    if indices.host is not None and indices.host.ndim == 0:
        return x.select(axis, indices.host.item())
    if indices.host is None and axis == 0 and x.dim() == 2:
        return functional.embedding(indices.tensor, x)
    index: list[Any] = [slice(None)] * axis
    return x[(*index, indices.tensor)]


def _gather_nd(call: Call) -> Result:
    if call.attribute("batch_dims", 0):
        raise call.error("gathers by batch, which is not supported")
    x, indices = call.tensor(0), call.tensor(1)
    return x[tuple(indices.unbind(-1))]


def _scatter_nd(call: Call) -> Result:
    if call.attribute("reduction", "none") != "none":
        raise call.error("scatters with a reduction, which is not supported")
    x, indices, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    return x.index_put(tuple(indices.unbind(-1)), updates)


def _unsqueeze(call: Call) -> Result:
    x, axes = call.tensor(0), call.axes(1) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call) -> Result:
    x, axes = call.tensor(0), call.axes(1)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _expand(call: Call) -> Result:
    x, sizes = call.tensor(0), call.numbers(1)
    rank = max(x.dim(), len(sizes))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(sizes)) + sizes
    return x.expand(
        [mine if _is_one(size) else size for mine, size in zip(own, wanted, strict=True)]
    )


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _pad(call: Call) -> Result:
    x = call.tensor(0)
    pads = call.numbers(1) if call.has(1) else call.attribute("pads")
    axes = call.axes(3) if call.has(3) else list(range(x.dim()))
    mode = {"edge": "replicate", "wrap": "circular"}.get(*[call.attribute("mode", "constant")] * 2)
    before_after = [(0, 0)] * x.dim()
    half = len(pads) // 2
    for position, axis in enumerate(axes or []):
        before_after[axis] = (pads[position], pads[position + half])
    if mode == "constant":
        value = call.numbers(2)[0] if call.has(2) else call.attribute("value", 0.0)
        return functional.pad(x, _torch_pads(before_after), "constant", value)
    if any(pair != (0, 0) for pair in before_after[:-2]):
        raise call.error(f"pads batch or channels in mode {mode}, which is not supported")
    return functional.pad(x, _torch_pads(before_after[-2:]), mode)


def _torch_pads(pairs: list[tuple[Any, Any]]) -> list[Any]:
    return [size for pair in reversed(pairs) for size in pair]


def _constant_of_shape(call: Call) -> Result:
    given = call.attribute("value")
    fill, kind = (0.0, torch.float32)
    if given is not None:
        one = torch.from_numpy(np.array(given, copy=True)).ravel()[0]
        kind, fill = one.dtype, one.item()
    sizes = call.numbers(0)
    if (
        len(sizes) <= 1
        and all(type(size) is int for size in sizes)
        and math.prod(sizes) <= HOST_LIMIT
    ):
        return Value(host=host_array([fill] * math.prod(sizes), tuple(sizes)), dtype=kind)
    return torch.full(sizes, fill, dtype=kind)


def _range(call: Call) -> Result:
    start, end, step = (call.numbers(index)[0] for index in range(3))
    kind = call.value(0).dtype
    numbers = (start, end, step)
    if all(type(number) is int for number in numbers) and abs(end - start) <= HOST_LIMIT:
        return Value(host=host_array(range(start, end, step)), dtype=kind)
    return torch.arange(start, end, step, dtype=kind)


def _triangle(call: Call) -> Result:
    offset = int(call.numbers(1)[0]) if call.has(1) else 0
    function = torch.triu if call.attribute("upper", 1) else torch.tril
    return function(call.tensor(0), offset)


def _depth_to_space(call: Call) -> Result:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call) -> Result:
    x, block = call.tensor(0), call.attribute("blocksize")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


def _one_hot(call: Call) -> Result:
    depth = int(call.numbers(1)[0])
    off, on = call.tensor(2).unbind(0)
    axis = call.attribute("axis", -1)
    hot = functional.one_hot(call.tensor(0).long() % depth, depth).movedim(-1, axis)
    return torch.where(hot.bool(), on, off)


def _tile(call: Call) -> Result:
    return call.tensor(0).repeat(call.numbers(1))


SHAPES: Table = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda call: torch.gather(
        call.tensor(0), call.attribute("axis", 0), call.tensor(1)
    ),
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Trilu": _triangle,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "OneHot": _one_hot,
}


def _host(call: Call) -> HostArray:
    array = call.value(0).host
    assert array is not None
    return array


def _same(call: Call, array: Any) -> Value:
    shaped = array if isinstance(array, np.ndarray) else host_array([array], ())
    return Value(host=shaped, dtype=call.value(0).dtype)


def _host_gather(call: Call) -> Result:
    indices = call.value(1).host
    assert indices is not None
    return _same(
        call, np.take(_host(call), indices.astype(np.int64), axis=call.attribute("axis", 0))
    )


def _host_slice(call: Call) -> Result:
    array = _host(call)
    for axis, start, end, step in _slices(call, array.ndim):
        array = array[(*[slice(None)] * axis, slice(int(start), int(end), step))]
    return _same(call, array)


def _host_concat(call: Call) -> Result:
    parts = [value.host for value in call.inputs if value is not None and value.host is not None]
    return _same(call, np.concatenate(parts, axis=call.attribute("axis")))


def _host_unsqueeze(call: Call) -> Result:
    return _same(call, np.expand_dims(_host(call), tuple(call.axes(1) or ())))


def _host_squeeze(call: Call) -> Result:
    axes = call.axes(1)
    return _same(call, np.squeeze(_host(call), None if axes is None else tuple(axes)))


def _host_reshape(call: Call) -> Result:
    array = _host(call)
    keep_zero = bool(call.attribute("allowzero", 0))
    sizes = _target_shape(call.numbers(1), array.shape, keep_zero)
    return _same(call, array.reshape([int(size) for size in sizes]))


def _host_expand(call: Call) -> Result:
    sizes = call.numbers(1)
    array = _host(call)
    if not all(type(size) is int for size in sizes) or math.prod(sizes) > HOST_LIMIT:
        return _expand(call)
    return _same(call, np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(sizes))))


HOST_SHAPES: Table = {
    "Gather": _host_gather,
    "Slice": _host_slice,
    "Concat": _host_concat,
    "Unsqueeze": _host_unsqueeze,
    "Squeeze": _host_squeeze,
    "Reshape": _host_reshape,
    "Expand": _host_expand,
}
