"""Which job starts where: the device on which it ends first, one job at a time on each."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from suanli.base.queue_results import Job


@dataclass(frozen=True, kw_only=True)
class Place:
    """A device as the queue sees it.

    Attributes:
        memory_bytes: All that it has.
        free_bytes: What is free now.
    """

    device: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job that can start now."""

    job: Job
    device: str


def next_start(
    waiting: Sequence[Job], places: Sequence[Place], busy: Mapping[str, float | None]
) -> Start | None:
    """The first job in the queue whose best device is free.

    A job waits for a busy device where it would end there earlier, by the times that are known;
    where none is known the first device that is free and fits is as good as another, GPUs first.

    Args:
        waiting: In the order of the queue.
        places: The devices, the CPU first.
        busy: Device -> seconds until it is free; None where that is not known.
    """
    taken: dict[str, float | None] = dict(busy)
    for job in waiting:
        fitting = [p for p in places if not why_not(job, p) and _fits_now(job, p, taken)]
        if not fitting:
            continue
        best = min(fitting, key=lambda place: _end(job, place, taken))
        if best.device not in taken:
            return Start(job=job, device=best.device)
        # it waits for that device, so a later job must not think that it comes first
        queued, own = taken[best.device], job.need_on(best.device).seconds
        taken[best.device] = None if queued is None or own is None else queued + own
    return None


def why_not(job: Job, place: Place) -> str:
    """Why a job can never run on a device, in one line; "" if it can."""
    if job.wanted not in ("auto", place.device):
        return f"{job.wanted} was asked for"
    need = job.need_on(place.device).memory_bytes
    if need is not None and need > place.memory_bytes:
        return f"needs {need / 1e9:.1f} GB, {place.device} has {place.memory_bytes / 1e9:.1f} GB"
    return ""


def why_nowhere(job: Job, places: Sequence[Place]) -> str:
    """Why a job can run on no device, in one line; "" if it can on one."""
    reasons = [why_not(job, place) for place in places]
    return "" if not all(reasons) else "; ".join(reasons) or "there is no device"


def why_waits(job: Job, places: Sequence[Place], busy: Collection[str]) -> str:
    """That a job waits for memory which others than the queue's jobs hold; "" where it does not.

    Args:
        job: It waits.
        places: The devices with what is free now.
        busy: Devices on which a job of the queue runs: there its end is waited for.
    """
    possible = [place for place in places if not why_not(job, place)]
    taken = dict.fromkeys(busy)
    if not possible or any(_fits_now(job, place, taken) for place in possible):
        return ""
    needs = [(job.need_on(place.device).memory_bytes or 0) / 1e9 for place in possible]
    parts = [
        f"{place.device} has {place.free_bytes / 1e9:.1f} GB free of the {need:.1f} GB it needs"
        for place, need in zip(possible, needs, strict=True)
    ]
    return f"it waits for memory that others hold: {'; '.join(parts)}"


def _fits_now(job: Job, place: Place, busy: Mapping[str, float | None]) -> bool:
    """Whether there is room now; a busy device will have room when its job is over."""
    need = job.need_on(place.device).memory_bytes
    return place.device in busy or need is None or need <= place.free_bytes


def _end(job: Job, place: Place, busy: Mapping[str, float | None]) -> tuple[float, float, int]:
    """For comparing devices: when the job would end, then when it would begin, then GPUs first."""
    waits = busy.get(place.device, 0.0)
    seconds = job.need_on(place.device).seconds
    gpu = 0 if place.device.startswith("cuda") else 1
    never = float("inf")
    begin = never if waits is None else waits
    if seconds is None:
        # an unknown time is worse than a known one only where the latter begins now
        return (never, begin, gpu)
    return (begin + seconds, begin, gpu)
