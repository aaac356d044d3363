"""Mean power of a card during a step, and what a lower power limit does to its time."""

from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.gpu_rates import watts_per_tflop
from suanli.cost.parameters import Clock, Unit


def mean_power_w(
    gpu: GpuSheet,
    clock: Clock,
    *,
    flops_per_s: float,
    bytes_per_s: float,
    unit: Unit,
    busy: float,
    limit_w: float | None = None,
) -> float | None:
    """Mean watts of a card in a step; None where its sheet has no power limit.

    What it takes at rest with its clocks up, more while any kernel runs, and energy for each
    operation and each byte moved.

    Args:
        gpu: The card's sheet.
        clock: The power figures of the parameter file.
        flops_per_s: Operations of products per second, over the whole step.
        bytes_per_s: Bytes moved per second, over the whole step.
        unit: What the products run on.
        busy: Part of the step in which kernels run.
        limit_w: A limit set below the card's own.
    """
    if gpu.power_w is None:
        return None
    wanted = rest_w(gpu, clock) + clock.busy_share * busy * gpu.power_w
    wanted += watts_per_tflop(gpu, clock, unit) * flops_per_s / 1e12
    wanted += clock.busy_w_per_gb_per_s * bytes_per_s / 1e9
    return min(wanted, clock.limit_reached * min(limit_w or gpu.power_w, gpu.power_w))


def carried_w(
    target: GpuSheet, clock: Clock, *, measured_w: float, here_w: float, there_w: float
) -> float:
    """Mean watts on a card, from those of the same step measured on another one.

    In proportion to what is predicted for both, up to the target's limit: what the model does not
    know of the job makes both cards busier or idler than it thinks.

    Args:
        target: The card asked for.
        clock: The power figures of the parameter file.
        measured_w: On the other card.
        here_w: Predicted for the other card.
        there_w: Predicted for the target.
    """
    return min(there_w * measured_w / here_w, clock.limit_reached * (target.power_w or there_w))


def rest_w(gpu: GpuSheet, clock: Clock) -> float:
    """Watts of a card that waits with its clocks up; 0 where its sheet has no power limit."""
    return clock.idle_share * (gpu.power_w or 0.0)


def slowdown(gpu: GpuSheet, clock: Clock, *, wanted_w: float, limit_w: float) -> float:
    """How many times longer a step takes that would draw more power than a limit gives.

    1 where the limit does not bind. Steps are seldom bound by the clock alone, so time grows less
    than the clock falls.

    Args:
        gpu: The card's sheet.
        clock: The power figures of the parameter file.
        wanted_w: Mean watts without the limit.
        limit_w: The limit.
    """
    floor_w = clock.limit_floor * (gpu.power_w or 0.0)
    left = max(clock.limit_reached * limit_w - floor_w, 5.0)
    want = max(wanted_w - floor_w, 1.0)
    return float(max(1.0, want / left) ** clock.limit_exponent)
