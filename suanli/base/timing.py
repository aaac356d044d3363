"""Measured quantities with their uncertainty."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median with its 95 % interval. The unit stands in the name of the field that holds it."""

    p50: float
    lo95: float
    hi95: float

    @property
    def relative_width(self) -> float:
        """Width of the interval over the median (dimensionless)."""
        return (self.hi95 - self.lo95) / self.p50 if self.p50 else float("inf")

    def scaled(self, factor: float) -> "Estimate":
        """The same estimate in another unit (`factor` > 0)."""
        return Estimate(p50=self.p50 * factor, lo95=self.lo95 * factor, hi95=self.hi95 * factor)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call on one batch.

    Attributes:
        step_ms: Milliseconds per call.
        batch: Samples per call.
        samples_per_s: `batch` over the median call.
        repeats: How many calls were timed.
    """

    step_ms: Estimate
    batch: int
    samples_per_s: float
    repeats: int
