"""How sure a prediction is: wider the farther the card is from what was fitted."""

from math import exp, sqrt

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import Interval
from suanli.cost.parameters import Parameters

# A normal distribution has 90 % of its mass within so many standard deviations of the mean.
_NINETY = 1.645
# Part of a step from which on it is said that the host widens its interval.
_MUCH = 0.3


def interval(p50: float, spread: float) -> Interval:
    """The 90 % interval around a median, for an error whose logarithm is normal."""
    factor = exp(_NINETY * spread)
    return Interval(p50=p50, lo90=p50 / factor, hi90=p50 * factor)


def spread_of(
    gpu: GpuSheet,
    missing: tuple[str, ...],
    p: Parameters,
    *,
    base: float | None = None,
    waiting: float = 0.0,
) -> tuple[float, tuple[str, ...]]:
    """Standard deviation of log(measured / predicted) on this card, and why it is wider.

    Independent errors add in square: what remains on fitted generations, an unfitted generation
    (the more, the farther), each figure that the sheet lacks, and the host, of which no sheet of a
    card tells, in the part of the step in which the card waits for it.

    Args:
        gpu: The card.
        missing: Figures that its sheet lacks.
        p: The constants.
        base: What remains otherwise; that of whole steps where None.
        waiting: Part of the step in which the card waits for the host.
    """
    variance = (p.spread.base if base is None else base) ** 2
    reasons = []
    if gpu.compute_capability not in p.fitted_capabilities:
        nearest = min(
            (abs(float(gpu.compute_capability) - float(c)) for c in p.fitted_capabilities),
            default=0.0,
        )
        variance += p.spread.unseen_generation**2 + (p.spread.generation_step * nearest) ** 2
        reasons.append(
            f"no card of compute capability {gpu.compute_capability} was among those fitted"
        )
    for figure in missing:
        variance += p.spread.unknown_figure**2
        reasons.append(f"the sheet of {gpu.name} has no {figure}")
    variance += (p.spread.host * waiting) ** 2
    if waiting > _MUCH:
        reasons.append(
            f"the card waits for the host in {100 * waiting:.0f} % of the step, and hosts differ"
        )
    return sqrt(variance), tuple(reasons)
