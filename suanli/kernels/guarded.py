"""Memory that shows what a kernel did to it: poisoned before, guarded at both ends."""

from dataclasses import dataclass

import torch

# Bytes before and behind each tensor; a kernel that runs further off usually crashes.
_GUARD_BYTES = 16384
_PATTERNS = (0xA5, 0x5A)


@dataclass(frozen=True, kw_only=True)
class _Region:
    name: str
    raw: torch.Tensor
    size: int
    before: torch.Tensor


class GuardedMemory:
    """Gives tensors inside larger allocations and later tells whether their borders were written.

    Outputs are filled with NaN (floating point) or a byte pattern, inputs keep their values, and
    what surrounds an input is NaN, so that a value read from outside shows in the result.

    Args:
        device: torch's name of the device.
        pattern: 0 or 1; a value that differs between two runs with different patterns was never
            written, or came from memory that was not.
    """

    def __init__(self, device: str, pattern: int = 0) -> None:
        self._device = device
        self._byte = _PATTERNS[pattern]
        self._regions: list[_Region] = []
        self._outputs = 0

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Poisoned memory for an output."""
        self._outputs += 1
        count = 1
        for side in shape:
            count *= side
        payload = self._take(f"output {self._outputs}", count, dtype)
        return payload.view(shape)

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A guarded copy of an input, with the same strides."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        payload = self._take(name, extent, tensor.dtype)
        return payload.as_strided(tensor.shape, tensor.stride(), payload.storage_offset()).copy_(
            tensor
        )

    def violations(self) -> list[str]:
        """One line per tensor that was written outside its bounds."""
        found = []
        for region in self._regions:
            wrong = region.raw != region.before
            wrong[_GUARD_BYTES : _GUARD_BYTES + region.size] = False
            places = wrong.nonzero().flatten()
            if places.numel():
                at = int(places[0])
                side = "before" if at < _GUARD_BYTES else "behind"
                found.append(f"{region.name}: {places.numel()} bytes written {side} its memory")
        return found

    def _take(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        item = dtype.itemsize
        size = count * item
        # in whole units of the widest dtype, so that all of it can be seen as any
        whole = (size + 2 * _GUARD_BYTES + 15) // 16 * 16
        raw = torch.full((whole,), self._byte, dtype=torch.uint8, device=self._device)
        if dtype.is_floating_point:
            raw.view(dtype).fill_(float("nan"))
        self._regions.append(_Region(name=name, raw=raw, size=size, before=raw.clone()))
        return raw[_GUARD_BYTES : _GUARD_BYTES + size].view(dtype)
