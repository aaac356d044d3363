"""Mean power of a card during a step, and what a lower power limit does to its time."""

from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.parameters import Clock


def mean_power_w(
    gpu: GpuSheet, clock: Clock, *, busy: float, compute_share: float, limit_w: float | None = None
) -> float | None:
    """Mean watts of a card in a step; None where its sheet has no power limit.

    Args:
        gpu: The card's sheet.
        clock: The power figures of the parameter file.
        busy: Part of the step in which a kernel runs.
        compute_share: Part of that time which products need at the rate that they sustain.
        limit_w: A limit set below the card's own.
    """
    if gpu.power_w is None:
        return None
    cap = min(limit_w or gpu.power_w, gpu.power_w)
    idle = clock.idle_share * gpu.power_w
    load = clock.busy_share + (1.0 - clock.busy_share) * min(1.0, max(0.0, compute_share))
    wanted = idle + (gpu.power_w - idle) * min(1.0, max(0.0, busy)) * load
    return min(wanted, cap)


def slowdown(wanted_w: float, limit_w: float, idle_w: float, clock: Clock) -> float:
    """How many times longer a step takes that wants more power than the limit gives.

    1 where the limit does not bind.
    """
    if wanted_w <= limit_w:
        return 1.0
    left = max(limit_w - idle_w, 0.05 * limit_w)
    return ((wanted_w - idle_w) / left) ** clock.exponent
