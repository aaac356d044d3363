"""What a device is and what it can do at most."""

from dataclasses import dataclass, field
from typing import Literal

Mark = Literal["measured", "derived", "datasheet"]
What = Literal[
    "matmul", "read", "copy", "call_overhead", "host_to_device", "device_to_host", "link"
]


@dataclass(frozen=True, kw_only=True)
class CpuInfo:
    """The processor, as this process may use it.

    Attributes:
        usable_cores: Cores allowed by affinity and by the cgroup's quota.
        features: Instruction sets that matter here, such as "avx512f", "avx512_vnni", "amx_bf16".
        cache_bytes: Size of one instance per level, such as {"L1d": 49152, "L2": 2097152}.
    """

    model: str
    architecture: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    features: tuple[str, ...]
    cache_bytes: dict[str, int]
    memory_bytes: int
    memory_available_bytes: int


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    """One GPU as the driver and torch see it. None where it cannot be read."""

    name: str
    index: int
    memory_bytes: int
    compute_capability: str | None = None
    multiprocessors: int | None = None
    driver: str | None = None
    power_limit_w: float | None = None
    clock_mhz: int | None = None
    links: int | None = None
    uuid: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device by name ("cpu", "cuda:0") with a fingerprint that changes when it is another one."""

    name: str
    title: str
    fingerprint: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One thing that a device can do at most.

    Attributes:
        what: The quantity; `unit` is "FLOP/s", "B/s" or "s".
        dtype: Element type for "matmul" ("fp32", "tf32", "bf16", "fp16", "int8", "fp8"), else None.
        hardware: The hardware's own figure, from a register-only loop; None where unknown.
        achieved: The best that any library reached at its best shape; None where none was tried.
        spread: (third quartile - first quartile) / median over the repeats of `hardware`, or of
            `achieved` where `hardware` is None.
        mark: Where `hardware` comes from.
        working_set_bytes: For "read" and "copy", the size of the data.
        datasheet: The card's datasheet figure, where the card is catalogued.
        how: One line: what was run.
    """

    what: What
    unit: str
    dtype: str | None = None
    hardware: float | None = None
    achieved: float | None = None
    spread: float = 0.0
    mark: Mark = "measured"
    working_set_bytes: int | None = None
    datasheet: float | None = None
    how: str = ""

    @property
    def best(self) -> float | None:
        """The larger of the two figures: what SOL may use without ever being beaten."""
        known = [value for value in (self.hardware, self.achieved) if value is not None]
        return max(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """All the ceilings of one device, measured at one time.

    Attributes:
        rounds: How often they were measured; each figure is the best of all rounds.
    """

    device: DeviceInfo
    items: tuple[Ceiling, ...]
    threads: int
    measured_at: str
    seconds_spent: float = 0.0
    rounds: int = 1

    def peak_flops(self, dtype: str) -> float | None:
        """Highest FLOP/s for `dtype` (operations for int8), or None if it was not measured."""
        rates = [c.best for c in self.items if c.what == "matmul" and c.dtype == dtype]
        known = [rate for rate in rates if rate is not None]
        return max(known) if known else None

    def read_bytes_per_s(self, working_set_bytes: float) -> float | None:
        """Highest read bandwidth in B/s at which data of this size can be read again and again.

        Between two measured sizes the figure of the smaller one holds, so that the bound stays a
        bound: data that is a little larger than a cache may still be partly served by it.
        """
        reads = sorted(
            (c.working_set_bytes, c.best)
            for c in self.items
            if c.what == "read" and c.working_set_bytes is not None and c.best is not None
        )
        if not reads:
            return None
        fitting = [rate for size, rate in reads if size <= working_set_bytes]
        larger = [rate for size, rate in reads if size > working_set_bytes]
        return max([fitting[-1], *larger]) if fitting else max(larger)

    def overhead_s(self) -> float:
        """Seconds that one call costs at least (0 where it was not measured)."""
        return min(
            (c.best for c in self.items if c.what == "call_overhead" and c.best), default=0.0
        )


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """Whether an optional backend can be used here."""

    name: str
    present: bool
    version: str | None
    install: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something in the environment that costs speed or will break, and how to mend it."""

    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a measurement depends on beside the plan."""

    suanli: str
    python: str
    os: str
    machine: str
    cores: int
    libraries: dict[str, str] = field(default_factory=dict)
    driver: str | None = None
    load_average: float | None = None

    def differences(self, other: "Environment") -> list[str]:
        """One line per entry in which `other` is not this environment; load is left out."""
        lines = []
        for name in ("suanli", "python", "os", "machine", "cores", "driver"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                lines.append(f"{name}: {mine} -> {theirs}")
        for library in sorted(self.libraries.keys() | other.libraries.keys()):
            old, new = self.libraries.get(library), other.libraries.get(library)
            if old != new:
                lines.append(f"{library}: {old or 'absent'} -> {new or 'absent'}")
        return lines
