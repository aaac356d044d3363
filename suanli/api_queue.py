"""Layer 7: the verb `suanli queue` in Python."""

import math
from dataclasses import replace
from pathlib import Path

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener, ignore
from suanli.base.queue_results import Job, Need, QueueResult


def add(
    command: tuple[str, ...],
    *,
    device: str = "auto",
    memory_gb: float | None = None,
    seconds: float | None = None,
    on_event: Listener = ignore,
) -> QueueResult:
    """Put a command at the end of this machine's queue.

    Args:
        command: A verb and its words, such as `("train", "digits-resnet", "--epochs", "20")`.
        device: Where it has to run, or "auto".
        memory_gb: What it needs, in 1e9 bytes; with `seconds` nothing is predicted.
        seconds: How long it takes.
        on_event: Told what is going on.

    Raises:
        BadInputError: It cannot be queued, or no device here can run it.
    """
    from suanli.jobs import command as commands
    from suanli.jobs.estimate import places
    from suanli.jobs.place import why_nowhere
    from suanli.jobs.store import JobStore

    job, here = _made(command, device, memory_gb, seconds, on_event), places()
    reason = why_nowhere(job, here)
    if reason:
        raise BadInputError(
            f"no device here can run it: {reason}",
            next_step="--print slurm or kubernetes gives the line for a cluster",
        )
    out = commands.out_of(job.command) if job.command[0] == "train" else ""
    if out and commands.finished(out, Path(job.folder)):
        job = replace(job, reason=f"{out} holds a run that has ended: the job will end at once")
    return _result(JobStore().add(job))


def line(
    scheduler: str,
    command: tuple[str, ...],
    *,
    device: str = "auto",
    memory_gb: float | None = None,
    seconds: float | None = None,
    on_event: Listener = ignore,
) -> str:
    """The same command for a cluster's scheduler ("slurm", "kubernetes"); nothing is queued."""
    from suanli.jobs import command as commands
    from suanli.jobs.cluster import line_for

    job = _made(command, device, memory_gb, seconds, on_event)
    words = commands.with_out(job.command, 1, Path(job.folder))
    out = commands.out_of(words) if words[0] == "train" else ""
    return line_for(scheduler, replace(job, command=words, out=out))


def listed() -> QueueResult:
    """All jobs, the oldest first; of those that wait for memory that is said."""
    from suanli.jobs.estimate import places
    from suanli.jobs.place import why_waits
    from suanli.jobs.store import JobStore

    jobs = JobStore().all()
    if not any(job.state == "waiting" for job in jobs):
        return _result(*jobs)
    here, busy = places(), {job.device for job in jobs if job.state == "running"}
    reasons = [why_waits(job, here, busy) if job.state == "waiting" else "" for job in jobs]
    return _result(
        *(
            replace(job, reason="; ".join(part for part in (job.reason, reason) if part))
            for job, reason in zip(jobs, reasons, strict=True)
        )
    )


def remove(number: int) -> QueueResult:
    """Take a job that does not run off the queue.

    Raises:
        BadInputError: There is none of that number, or it runs.
    """
    from suanli.jobs.store import JobStore

    return _result(JobStore().remove(number))


def run(*, on_event: Listener = ignore) -> QueueResult:
    """Work the queue off: one job at a time on each device; interrupted runs are gone on with.

    Ctrl-C and SIGTERM let the running jobs save; they wait for the next call.
    """
    from suanli.jobs.estimate import places
    from suanli.jobs.runner import Runner
    from suanli.jobs.store import JobStore
    from suanli.training.stopping import StopRequests

    store = JobStore()
    with StopRequests() as stop:
        asked = Runner(store, places, on_event).run(stop)
    return replace(_result(*store.all()), interrupted=asked)


def _made(
    command: tuple[str, ...],
    device: str,
    memory_gb: float | None,
    seconds: float | None,
    on_event: Listener,
) -> Job:
    from suanli.devices import device as find_device
    from suanli.jobs import command as commands
    from suanli.jobs.estimate import needs_of, places
    from suanli.jobs.store import JobStore

    job = Job(id=0, command=commands.checked(command), folder=str(Path.cwd()), wanted=device)
    if device != "auto":
        find_device(device)
    for name, value in (("--memory", memory_gb), ("--time", seconds)):
        if value is not None and not 0 < value < math.inf:
            raise BadInputError(f"{name} must be more than 0, not {value:g}")
    if memory_gb is not None and seconds is not None:
        needs: tuple[Need, ...] = tuple(Need(device=place.device) for place in places())
    else:
        on_event(Event(kind="step", text="predicting what the job needs"))
        needs = needs_of(job, places(), JobStore().all())
    return replace(job, needs=tuple(_given(need, memory_gb, seconds) for need in needs))


def _given(need: Need, memory_gb: float | None, seconds: float | None) -> Need:
    if memory_gb is None and seconds is None:
        return need
    return replace(
        need,
        memory_bytes=int(memory_gb * 1e9) if memory_gb is not None else need.memory_bytes,
        seconds=seconds if seconds is not None else need.seconds,
        source="given",
    )


def _result(*jobs: Job) -> QueueResult:
    return QueueResult(schema=schema.name("queue"), verb="queue", jobs=jobs)
