"""A device that computes nothing: a GPU of any make, on a clock that the test sets.

Work given to it runs on the CPU through torch as it is, so that the code around a GPU is run for
real; only identity, memory and time are made up.
"""

from collections.abc import Callable
from itertools import count

from suanli.base.hardware import DeviceInfo, GpuInfo
from suanli.devices.device import Event, Kind, MemoryUse, fingerprint


class NullEvent:
    """A reading of the null device's clock."""

    def __init__(self, device: "NullDevice") -> None:
        self._device = device
        self.at_s: float | None = None

    def record(self) -> None:
        """Read the clock, after it has moved by the device's next tick."""
        self._device.advance(self._device.next_tick())
        self.at_s = self._device.clock_s

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between the two readings.

        Raises:
            ValueError: One of them was never recorded, or is another device's.
        """
        if not isinstance(earlier, NullEvent) or earlier.at_s is None or self.at_s is None:
            raise ValueError("both events must be recorded on the null device")
        return self.at_s - earlier.at_s


class NullDevice:
    """A scripted GPU.

    Args:
        gpu: What it claims to be.
        tick: Seconds by which the clock moves at the n-th recorded event; 1 ms each by default.
        energy_j: Its energy counter, or None for a card without one.

    Attributes:
        clock_s: Its time; `advance` moves it.
        threads: What `set_threads` was last given.
    """

    kind: Kind = "cuda"
    torch_device = "cpu"

    def __init__(
        self,
        gpu: GpuInfo,
        *,
        tick: Callable[[int], float] = lambda _: 1e-3,
        energy_j: float | None = None,
    ) -> None:
        self.gpu = gpu
        self.name = f"cuda:{gpu.index}"
        self.clock_s = 0.0
        self.used_bytes = 0
        self.peak_bytes = 0
        self.threads: int | None = None
        self.synchronized = 0
        self._tick = tick
        self._ticks = count()
        self._energy_j = energy_j

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock_s += seconds

    def next_tick(self) -> float:
        """Seconds that the script gives to the next recorded event."""
        return self._tick(next(self._ticks))

    def allocate(self, n_bytes: int) -> None:
        """Take memory (a negative size gives it back)."""
        self.used_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    @property
    def info(self) -> DeviceInfo:
        """Identity made from what it claims to be."""
        return DeviceInfo(
            name=self.name,
            title=self.gpu.name,
            fingerprint=fingerprint("null", self.gpu),
            memory_bytes=self.gpu.memory_bytes,
        )

    def synchronize(self) -> None:
        """Counted, for tests that ask whether anyone waited."""
        self.synchronized += 1

    def event(self) -> NullEvent:
        """A reading of the scripted clock, not taken yet."""
        return NullEvent(self)

    def memory(self) -> MemoryUse:
        """What `allocate` was told."""
        return MemoryUse(used=self.used_bytes, peak=self.peak_bytes, total=self.gpu.memory_bytes)

    def reset_peak_memory(self) -> None:
        """Start a new peak at what is used now."""
        self.peak_bytes = self.used_bytes

    def energy_j(self) -> float | None:
        """The scripted counter."""
        return self._energy_j

    def power_w(self) -> float | None:
        """None: the script has no power."""
        return None

    def set_threads(self, threads: int) -> None:
        """Kept in `threads`; torch's own setting is left alone."""
        self.threads = threads
