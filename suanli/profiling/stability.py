"""How much steps differ from each other, and why the slow ones were slow."""

from statistics import median, quantiles

from suanli.base.profile_results import SlowStep, Stability
from suanli.cost.cpu_manner import PAGE_FAULT_S
from suanli.profiling.stopwatch import StepTime

# A step is an outlier when it is above the median by so many spreads and by so much of it.
_SPREADS, _LEAST = 5.0, 0.2
# A cause must explain this part of what the step took too long.
_EXPLAINS = 0.5
_MOST = 20
_MANY_FAULTS, _MORE = 500, 3.0


def stability(steps: list[StepTime]) -> Stability:
    """Spread and outliers of steps that were timed one by one.

    Args:
        steps: At least one.
    """
    times = [s.ms for s in steps]
    typical = median(times)
    spread = 0.0
    if len(times) > 1 and typical > 0:
        low, _, high = quantiles(times, n=4, method="inclusive")
        spread = (high - low) / typical
    limit = typical * (1 + max(_LEAST, _SPREADS * spread))
    slow = [
        SlowStep(step=index, ms=s.ms, cause=_cause(s, steps, typical))
        for index, s in enumerate(steps)
        if s.ms > limit
    ]
    slow.sort(key=lambda s: -s.ms)
    return Stability(
        steps=len(steps), spread=spread, slowest_ms=max(times), outliers=tuple(slow[:_MOST])
    )


def _cause(step: StepTime, steps: list[StepTime], typical: float) -> str:
    """What explains most of the excess; "" where nothing does."""
    excess = step.ms - typical
    waited = step.parts["data"] - median(s.parts["data"] for s in steps)
    if waited >= _EXPLAINS * excess:
        return f"waited {waited:.1f} ms longer for its batch"
    if step.collected_ms >= _EXPLAINS * excess:
        return f"Python's garbage collector took {step.collected_ms:.1f} ms"
    faults = median(s.faults for s in steps)
    more = step.faults - faults
    if (
        step.faults > max(_MANY_FAULTS, _MORE * faults)
        and 1e3 * more * PAGE_FAULT_S >= _EXPLAINS * excess
    ):
        return f"{step.faults} pages of memory were faulted in, usually {faults:.0f}"
    switched = median(s.switched for s in steps)
    if step.switched > switched + 1:
        times = "once" if step.switched == 1 else f"{step.switched} times"
        return f"the system took the processor away {times}"
    return ""
