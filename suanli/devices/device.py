"""What every device offers, whatever it is made of."""

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from suanli.base.hardware import DeviceInfo, GpuInfo

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of device memory.

    Attributes:
        used: Taken now: by this process on a CPU, by everyone on a GPU.
        peak: The most that this process had since the last reset.
        total: All there is, or all that the cgroup grants.
    """

    used: int
    peak: int
    total: int


class Event(Protocol):
    """A mark in the device's stream of work."""

    def record(self) -> None:
        """Put the mark behind the work queued so far."""
        ...

    def seconds_since(self, earlier: "Event") -> float:
        """Seconds of device time between two recorded marks; waits for both."""
        ...


class Device(Protocol):
    """A thing that computes.

    `torch_device` is the name that torch knows it by. What a device *is* (cores, clocks, features)
    is not asked here: that stands in `CpuInfo` and `GpuInfo`.
    """

    name: str
    kind: Kind
    torch_device: str

    @property
    def info(self) -> DeviceInfo:
        """Name, title, memory, and a fingerprint that changes when it is another device."""
        ...

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        ...

    def event(self) -> Event:
        """A fresh, unrecorded event."""
        ...

    def memory(self) -> MemoryUse:
        """Bytes used now, at most, and in all."""
        ...

    def reset_peak_memory(self) -> None:
        """Start a new peak, where the device can."""
        ...

    def energy_j(self) -> float | None:
        """Joules on a counter that only grows, or None where it cannot be read."""
        ...

    def power_w(self) -> float | None:
        """Watts drawn now, or None where it cannot be read."""
        ...

    def set_threads(self, threads: int) -> None:
        """Host threads that torch uses for one operator from now on."""
        ...


@runtime_checkable
class GpuDevice(Device, Protocol):
    """A device that is a GPU; `gpu` holds its facts."""

    gpu: GpuInfo


def fingerprint(*facts: object) -> str:
    """Sixteen hexadecimal digits that change with any of the facts."""
    text = "\0".join(repr(fact) for fact in facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
