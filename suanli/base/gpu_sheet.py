"""A GPU as its maker describes it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GpuSheet:
    """One card as its maker describes it. None or absent where no source was found.

    Attributes:
        nvml_names: Names by which the driver reports exactly this card.
        memory_gb: Nominal size; the driver reports the bytes that can be used.
        memory_gb_per_s: 1e9 bytes per second.
        l2_mb: Size of the last-level cache in 2**20 bytes.
        nvlink_gb_per_s_both_ways: 1e9 bytes per second, the sum of both directions.
        dense_tflops: dtype -> 1e12 operations per second without sparsity.
        mark: "measured" or "datasheet".
        sources: Where the figures were read.
    """

    name: str
    nvml_names: tuple[str, ...]
    architecture: str
    compute_capability: str
    memory_gb: float
    sources: tuple[str, ...]
    dense_tflops: dict[str, float] = field(default_factory=dict)
    memory_gb_per_s: float | None = None
    multiprocessors: int | None = None
    l2_mb: float | None = None
    nvlink_gb_per_s_both_ways: float | None = None
    pcie_generation: int | None = None
    power_w: float | None = None
    year: int | None = None
    note: str = ""
    mark: Literal["measured", "datasheet"] = "datasheet"

    def flops(self, dtype: str) -> float | None:
        """Dense operations per second for a dtype such as "bf16"; None where unknown."""
        rate = self.dense_tflops.get(dtype)
        return None if rate is None else rate * 1e12

    @property
    def memory_bytes_per_s(self) -> float | None:
        """Bandwidth of the card's memory in B/s."""
        return None if self.memory_gb_per_s is None else self.memory_gb_per_s * 1e9
