"""The processor as a device. It works in order, so that its events are readings of a clock."""

import time
from functools import cached_property
from pathlib import Path

import psutil

from suanli.base.hardware import CpuInfo, DeviceInfo
from suanli.devices.cpu_facts import cpu_info
from suanli.devices.device import Event, Kind, MemoryUse, fingerprint
from suanli.devices.energy import PackageEnergy


class HostEvent:
    """An event of a device that is done with its work when the call returns."""

    def __init__(self) -> None:
        self._at_s: float | None = None

    def record(self) -> None:
        """Read the clock."""
        self._at_s = time.perf_counter()

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between the two readings.

        Raises:
            ValueError: One of them was never recorded, or is another device's.
        """
        if not isinstance(earlier, HostEvent) or earlier._at_s is None or self._at_s is None:
            raise ValueError("both events must be recorded on the CPU before they are compared")
        return self._at_s - earlier._at_s


class CpuDevice:
    """The processor of this machine, as far as this process may use it.

    Args:
        root: Where `proc` and `sys` stand.
    """

    name = "cpu"
    kind: Kind = "cpu"
    torch_device = "cpu"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._energy = PackageEnergy(root)

    @cached_property
    def facts(self) -> CpuInfo:
        """The processor's facts, read once."""
        return cpu_info(self._root)

    @property
    def info(self) -> DeviceInfo:
        """Identity; the fingerprint covers model, instruction sets, cores, caches and memory."""
        facts = self.facts
        # Memory to the whole GiB: kernels reserve a little more or less at each start.
        return DeviceInfo(
            name=self.name,
            title=f"{facts.model}, {facts.usable_cores} core{'s' * (facts.usable_cores > 1)}",
            fingerprint=fingerprint(
                facts.model,
                facts.architecture,
                facts.features,
                facts.usable_cores,
                sorted(facts.cache_bytes.items()),
                round(facts.memory_bytes / 2**30),
            ),
            memory_bytes=facts.memory_bytes,
        )

    def synchronize(self) -> None:
        """Nothing to wait for: a call on the CPU returns when its work is done."""

    def event(self) -> HostEvent:
        """A reading of the clock, not taken yet."""
        return HostEvent()

    def memory(self) -> MemoryUse:
        """Resident bytes of this process, now and at most."""
        used = int(psutil.Process().memory_info().rss)
        return MemoryUse(used=used, peak=max(_peak_bytes(), used), total=self.facts.memory_bytes)

    def reset_peak_memory(self) -> None:
        """Linux can forget the peak (code 5 to clear_refs); elsewhere it stays."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def energy_j(self) -> float | None:
        """Joules of all packages by RAPL, or None where they cannot be read."""
        return self._energy.joules()

    def power_w(self) -> float | None:
        """None: RAPL counts energy, and power over an interval is the caller's division."""
        return None

    def set_threads(self, threads: int) -> None:
        """Threads that torch uses for one operator."""
        import torch

        torch.set_num_threads(threads)


def _peak_bytes() -> int:
    """Most resident bytes since the last reset; 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
