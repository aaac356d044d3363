"""Nested state (of an optimiser, an average) as plain JSON and a flat dictionary of tensors."""

from typing import Any

import torch

from suanli.base.errors import ArtefactError

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"


def taken_apart(value: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """JSON in which each tensor is a name; the tensors are added to `tensors`, on the CPU.

    Raises:
        TypeError: Something in it is neither a tensor nor plain data.
    """
    if isinstance(value, torch.Tensor):
        name = prefix or "value"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [
            [key, taken_apart(item, tensors, f"{prefix}/{key}" if prefix else str(key))]
            for key, item in value.items()
        ]
        if not all(isinstance(key, int | str) for key, _ in pairs):
            raise TypeError("a key that is neither a number nor a text")
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {_PAIRS: pairs}
    if isinstance(value, list | tuple):
        items = [
            taken_apart(item, tensors, f"{prefix}/{index}" if prefix else str(index))
            for index, item in enumerate(value)
        ]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{prefix}: a {type(value).__name__} cannot be saved")


def put_together(data: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `taken_apart`.

    Raises:
        ArtefactError: A tensor is absent.
    """
    if isinstance(data, list):
        return [put_together(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if _TENSOR in data:
        if data[_TENSOR] not in tensors:
            raise ArtefactError(f"tensor {data[_TENSOR]} is absent")
        return tensors[data[_TENSOR]]
    if _TUPLE in data:
        return tuple(put_together(item, tensors) for item in data[_TUPLE])
    if _PAIRS in data:
        return {key: put_together(item, tensors) for key, item in data[_PAIRS]}
    return {key: put_together(item, tensors) for key, item in data.items()}
