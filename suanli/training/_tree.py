"""Nested state (of an optimiser, an average) as plain JSON and a flat dictionary of tensors."""

from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from suanli.base.errors import ArtefactError

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"


class NotDataError(TypeError):
    """Something in a state is neither a tensor that can be saved nor plain data."""


def taken_apart(value: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """JSON in which each tensor is a name; the tensors themselves are added to `tensors`.

    Single numbers of numpy are taken as Python's.

    Raises:
        NotDataError: Something in it is neither a tensor nor plain data.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or not _storable(value.dtype):
            raise NotDataError(f"{prefix}: a tensor of {value.layout}, {value.dtype}")
        name = prefix or "value"
        while name in tensors:  # "a/b" is a key as well as the path of one
            name += "'"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [
            [key, taken_apart(item, tensors, f"{prefix}/{key}" if prefix else str(key))]
            for key, item in value.items()
        ]
        for key, _ in pairs:
            if not isinstance(key, int | str):
                raise NotDataError(f"{prefix}: a {type(key).__name__} as a key")
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
    raise NotDataError(f"{prefix}: a {type(value).__name__}")


@cache
def _storable(dtype: torch.dtype) -> bool:
    """Whether safetensors hold such a type."""
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, RuntimeError):
        return False
    return True


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
