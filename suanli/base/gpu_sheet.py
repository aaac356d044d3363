"""A GPU as its maker describes it, or as it was measured."""

from dataclasses import dataclass, field, fields
from typing import Literal

# Bytes per second of one lane, one direction, after line coding: PCI Express base specification
# (8, 16 and 32 GT/s with 128b/130b).
_PCIE_LANE = {3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130, 5: 32e9 / 8 * 128 / 130}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where figures were read.

    Attributes:
        document: Title, or what was worked out from what.
        figures: Names of the fields; a rate is "dense_tflops.bf16".
    """

    document: str
    figures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GpuSheet:
    """One card as its maker describes it. None or absent where no source was found.

    Attributes:
        nvml_names: Names by which the driver reports exactly this card.
        aliases: Further short names by which a person may ask for it.
        fp32_cores_per_multiprocessor: Lanes of 32-bit floats ("CUDA cores").
        base_clock_mhz: The clock that the maker guarantees under load.
        boost_clock_mhz: The clock that the printed rates assume.
        memory_gb: Nominal size; the driver reports the bytes that can be used.
        memory_kind: Such as "HBM3".
        memory_gb_per_s: 1e9 bytes per second.
        l2_mb: Size of the last-level cache in 2**20 bytes.
        nvlink_gb_per_s_both_ways: 1e9 bytes per second, the sum of both directions.
        nvlink_gpus: How many cards are joined by it in the usual system (2 for a bridge, 1 where
            cards stand alone).
        link_gb_per_s: 1e9 bytes per second, one direction, between two cards of this machine, as
            measured; None where only the links above are known.
        dense_tflops: dtype -> 1e12 operations per second without sparsity.
        mark: "measured" or "datasheet".
        sources: Which document each figure is from.
    """

    name: str
    nvml_names: tuple[str, ...]
    architecture: str
    compute_capability: str
    memory_gb: float
    sources: tuple[Source, ...]
    aliases: tuple[str, ...] = ()
    dense_tflops: dict[str, float] = field(default_factory=dict)
    memory_kind: str = ""
    memory_gb_per_s: float | None = None
    multiprocessors: int | None = None
    fp32_cores_per_multiprocessor: int | None = None
    base_clock_mhz: float | None = None
    boost_clock_mhz: float | None = None
    l2_mb: float | None = None
    nvlink_gb_per_s_both_ways: float | None = None
    nvlink_gpus: int | None = None
    link_gb_per_s: float | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    power_w: float | None = None
    year: int | None = None
    note: str = ""
    mark: Literal["measured", "datasheet"] = "datasheet"

    def flops(self, dtype: str) -> float | None:
        """Dense operations per second for a dtype such as "bf16"; None where unknown."""
        rate = self.dense_tflops.get(dtype)
        return None if rate is None else rate * 1e12

    @property
    def memory_bytes(self) -> float:
        """Nominal size of the card's memory; makers count 2**30 bytes to the gigabyte."""
        return self.memory_gb * 2**30

    @property
    def memory_bytes_per_s(self) -> float | None:
        """Bandwidth of the card's memory in B/s."""
        return None if self.memory_gb_per_s is None else self.memory_gb_per_s * 1e9

    @property
    def pcie_bytes_per_s(self) -> float | None:
        """B/s of the PCI Express link in one direction, by the standard's lane rate."""
        lane = _PCIE_LANE.get(self.pcie_generation or 0)
        return None if lane is None or self.pcie_lanes is None else lane * self.pcie_lanes

    def source_of(self, figure: str) -> str | None:
        """The document that a figure was read from, or None.

        Args:
            figure: A field's name, or "dense_tflops.bf16".
        """
        for source in self.sources:
            if figure in source.figures:
                return source.document
        return None

    def known_figures(self) -> tuple[str, ...]:
        """Names of all figures that are filled in, rates as "dense_tflops.bf16"."""
        plain = tuple(
            item.name
            for item in fields(self)
            if item.name not in _NO_FIGURES and getattr(self, item.name) not in (None, "")
        )
        return (*plain, *(f"dense_tflops.{dtype}" for dtype in self.dense_tflops))


# What names a card or says something of the record itself.
_NO_FIGURES = {
    *("name", "nvml_names", "aliases", "architecture", "compute_capability", "year"),
    *("note", "mark", "sources", "dense_tflops"),
}
