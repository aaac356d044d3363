"""What the profile comes to: parts of the step, what binds it, and one line that says so."""

from collections.abc import Mapping, Sequence

from suanli.base import units
from suanli.base.profile_results import LostTime, OperatorProfile, StepTimes
from suanli.base.work import BoundBy, Operator, Phase, SpeedOfLight
from suanli.cost.work_kernels import kind_of
from suanli.profiling.rows import Row
from suanli.profiling.stopwatch import Part

_FAMILIES = {
    "product": "matrix products",
    "convolution": "convolutions",
    "attention": "attention",
    "recurrent": "recurrent layers",
    "rows": "normalisation, softmax and losses",
    "pointwise": "activations and other pointwise operators",
    "update": "the optimiser",
    "free": "copies and conversions",
}
_MOVED = ("copy", "clone", "reorder", "convert", "to_copy", "contiguous", "transpose", "cat", "pad")
_WORTH = 0.01  # of the step: less is not said


def step_times(
    parts: Mapping[Part, float],
    busy: Mapping[Phase, float],
    *,
    transfer_ms: float = 0.0,
    waited_ms: float = 0.0,
    device_bound: bool = False,
) -> StepTimes:
    """Parts of the step from what was timed outside and what its operators took.

    Args:
        parts: Milliseconds by part of the undisturbed step, as the host saw them.
        busy: Milliseconds of the operators by phase.
        transfer_ms: Copies between host and device.
        waited_ms: Waiting for other processes.
        device_bound: Whether operators run on a device beside the host: then the host's parts
            overlap with them, and waiting is what the device does not fill.
    """
    whole, computed = sum(parts.values()), sum(busy.values())
    rest = max(0.0, whole - computed - transfer_ms)
    data = min(rest, parts["data"]) if device_bound else parts["data"]
    waited = min(rest - data, waited_ms) if rest > data else 0.0
    return StepTimes(
        forward_ms=busy.get("forward", 0.0),
        backward_ms=busy.get("backward", 0.0),
        optimizer_ms=busy.get("optimizer", 0.0),
        data_ms=data,
        transfer_ms=transfer_ms,
        communication_ms=waited,
        idle_ms=max(0.0, rest - data - waited),
    )


def lost_time(
    times: StepTimes, rows: Sequence[OperatorProfile], sol: SpeedOfLight | None
) -> tuple[LostTime, ...]:
    """From the measured step down to the speed of light, by cause; empty without ceilings."""
    if sol is None:
        return ()
    known = [row for row in rows if row.sol_ms is not None]
    below: dict[BoundBy, float] = {"compute": 0.0, "memory": 0.0, "overhead": 0.0}
    limits: dict[BoundBy, float] = {"compute": 0.0, "memory": 0.0, "overhead": 0.0}
    for row in known:
        sol_ms = row.sol_ms or 0.0
        below[row.bound_by] += row.time_ms - min(row.time_ms, sol_ms)
        limits[row.bound_by] += min(row.time_ms, sol_ms)
    # rows that were faster than their own limits, or have none, leave a part of the whole's limit
    # to the others: what these lost is so much less
    missing, lost = max(0.0, sol.ms - sum(limits.values())), sum(below.values())
    below = {name: ms * max(0.0, 1 - missing / lost) if lost else 0.0 for name, ms in below.items()}
    # the bound of the whole counts one of its terms; what operators need beyond it is avoidable
    beyond = max(0.0, sum(limits.values()) - sol.ms)
    between = min(beyond, limits["memory"] + limits["overhead"])
    found = [
        LostTime(cause="waiting for data", bound_by="data", ms=times.data_ms),
        LostTime(cause="copies to the device", bound_by="data", ms=times.transfer_ms),
        LostTime(
            cause="waiting for other processes",
            bound_by="communication",
            ms=times.communication_ms,
        ),
        LostTime(cause="between operators", bound_by="overhead", ms=times.idle_ms),
        LostTime(cause="small operators", bound_by="overhead", ms=below["overhead"]),
        LostTime(cause="memory-bound, below the ceiling", bound_by="memory", ms=below["memory"]),
        LostTime(cause="traffic that fusion avoids", bound_by="memory", ms=between),
        LostTime(cause="compute-bound, below the ceiling", bound_by="compute", ms=below["compute"]),
        LostTime(cause="operations that can be left out", bound_by="compute", ms=beyond - between),
    ]
    rounding = 1e-12 * sum(item.ms for item in found)
    return tuple(item for item in found if item.ms > rounding)


def bound_by(times: StepTimes, rows: Sequence[OperatorProfile]) -> BoundBy:
    """What takes the most of the step."""
    shares: dict[BoundBy, float] = {
        "data": times.data_ms + times.transfer_ms,
        "communication": times.communication_ms,
        "overhead": times.idle_ms,
        "compute": 0.0,
        "memory": 0.0,
    }
    for row in rows:
        shares[row.bound_by] += row.time_ms
    return max(shares, key=lambda name: shares[name])


def family(row: Row) -> str:
    """In which group of operators a row is told."""
    if row.phase == "optimizer":
        return "update"
    if row.operators:
        main = max(row.operators, key=lambda op: (op.matmul, op.flops))
        return kind_of(main) if not _moves(main) else "free"
    return "free" if any(word in row.name.lower() for word in _MOVED) else "pointwise"


def _moves(op: Operator) -> bool:
    return not op.matmul and op.flops == 0


def verdict(
    bound: BoundBy, times: StepTimes, rows: Sequence[Row], sol: SpeedOfLight | None, step_ms: float
) -> str:
    """The profile in one line: what binds, the largest groups, and where data and idle stand."""
    groups: dict[tuple[str, Phase], float] = {}
    for row in rows:
        key = (family(row), row.phase)
        groups[key] = groups.get(key, 0.0) + row.ms
    largest = sorted(groups.items(), key=lambda item: -item[1])[:2]
    told = []
    training = times.backward_ms > 0
    for (name, phase), ms in largest:
        where = f" in {phase}" if training and phase != "optimizer" else ""
        if ms >= 0.05 * step_ms:
            told.append(f"{units.share(ms / step_ms)} is {_FAMILIES[name]}{where}")
    waited = times.data_ms + times.transfer_ms
    copied = times.transfer_ms > times.data_ms
    what = "copies between host and device" if copied else "waits for data"
    head = {
        "data": f"{what}: {units.share(waited / step_ms)} of the step",
        "overhead": "overhead-bound: nothing is computed in "
        f"{units.share(times.idle_ms / step_ms)} of the step"
        if 2 * times.idle_ms >= step_ms
        else "overhead-bound: calls weigh more than what they compute, "
        f"{units.share(times.idle_ms / step_ms)} of the step is between them",
        "communication": "waits for other processes: "
        f"{units.share(times.communication_ms / step_ms)} of the step",
        "compute": "compute-bound",
        "memory": "memory-bound",
    }[bound]
    parts = [", ".join(told)] if told else []
    if training and bound != "data":
        share = times.data_ms / step_ms
        loading = "hidden" if share < _WORTH else units.share(share)
        parts.append(f"data loading {loading}")
    if bound != "overhead" and times.idle_ms >= 0.1 * step_ms:
        parts.append(f"{units.share(times.idle_ms / step_ms)} between operators")
    if sol is not None and sol.fraction is not None:
        parts.append(f"{units.share(sol.fraction)} of the speed of light")
    return (
        f"{head}: {'; '.join(parts)}"
        if bound in ("compute", "memory")
        else "; ".join([head, *parts])
    )
