"""Bytes: what an operator reads and writes, and which parameters a step has to read."""

from collections.abc import Iterable
from typing import Any

import torch

_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Suanli's name of an element type, such as "fp32", "bf16" or "int8"."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dictionaries (model outputs are dictionaries)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [found for item in value for found in tensors_in(item)]
    return []


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def stored_elements(tensor: torch.Tensor) -> int:
    """Elements that lie in memory; an expanded dimension repeats what is there."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= int(size) if stride != 0 or size == 0 else 1
    return elements


def moved_bytes(
    tensors: Iterable[torch.Tensor], *, table: torch.Tensor | None = None, taken: int = 0
) -> int:
    """Bytes of the tensors, each once. Of `table` only what is `taken` moves."""
    seen: dict[tuple[int, int, int], int] = {}
    for tensor in tensors:
        size = stored_elements(tensor) * tensor.element_size()
        if tensor is table:
            size = min(size, taken)
        seen[(_storage(tensor), int(tensor.storage_offset()), size)] = size
    return sum(seen.values())


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that hold a tensor subclass's data; of a dense one itself."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in plain_tensors(getattr(tensor, name))]


class Parameters:
    """The parameters and buffers of a model: which of their bytes a step reads, each once."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._sizes: dict[int, tuple[int, int]] = {}
        self._read: dict[int, list[tuple[int, int]]] = {}
        self._taken: dict[int, int] = {}
        # Storages stay alive with the tensors, so that an address is not used again.
        self._alive = [inner for tensor in tensors for inner in plain_tensors(tensor)]
        for tensor in self._alive:
            self._sizes[_storage(tensor)] = (stored_elements(tensor), tensor.element_size())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all of them, at their stored dtype."""
        return sum(elements * width for elements, width in self._sizes.values())

    def touch(
        self,
        tensors: Iterable[torch.Tensor],
        *,
        table: torch.Tensor | None,
        taken: int,
        needed: bool,
    ) -> int:
        """Note that an operator reads these, and say how many bytes of them are parameters.

        Args:
            tensors: The operator's inputs.
            table: The one of which it reads a part only, or None.
            taken: Bytes of that part.
            needed: Whether no plan can avoid this read.
        """
        total = 0
        for tensor in tensors:
            key = _storage(tensor)
            if key not in self._sizes:
                continue
            elements, width = stored_elements(tensor), tensor.element_size()
            if tensor is table:
                elements = min(elements, taken // width)
                if needed:
                    self._taken[key] = self._taken.get(key, 0) + elements
            elif needed:
                start = int(tensor.storage_offset())
                self._read.setdefault(key, []).append((start, start + elements))
            total += elements * width
        return total

    def read(self) -> tuple[int, int]:
        """Elements and bytes that were read and needed, each once."""
        elements = size = 0
        for key, (whole, width) in self._sizes.items():
            count = min(whole, _covered(self._read.get(key, [])) + self._taken.get(key, 0))
            elements += count
            size += count * width
        return elements, size


def _covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of half-open spans."""
    total, reached = 0, -1
    for start, end in sorted(set(spans)):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
