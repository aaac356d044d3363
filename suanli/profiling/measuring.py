"""The passes over a subject: time it undisturbed, then look into it, and join the two."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch

from suanli.base.errors import CaptureError
from suanli.base.profile_results import ProfilerCost
from suanli.base.timing import Estimate
from suanli.base.work import Operator, Phase, Work
from suanli.devices import device as find_device
from suanli.engines.backend import LayerTime
from suanli.engines.backends._torch import use_inductor_cache
from suanli.measure.capturing.built import placed, places_of
from suanli.measure.step_record import SetPhase, record_step
from suanli.measure.timing import median_interval
from suanli.profiling import joining, processes, rows
from suanli.profiling.joining import Joined
from suanli.profiling.layers import spread
from suanli.profiling.processes import GoOn
from suanli.profiling.recording import Recording, record_steps
from suanli.profiling.rows import Row
from suanli.profiling.stopwatch import Part, StepTime, time_steps, typical_parts
from suanli.profiling.subjects import Subject, work_of

_WARM_SECONDS, _WARM_STEPS = 1.0, 2
_RECORDED = 3
_TIME_SECONDS, _RECORD_SECONDS = 10.0, 15.0
Say = Callable[[str], None]


@dataclass(kw_only=True)
class Measured:
    """Everything that was measured of a subject.

    Attributes:
        times: Undisturbed steps, one by one.
        step_ms: Their median.
        parts: Milliseconds by part of the usual step.
        work: As the model is written; None where it cannot be counted.
        operators: As they really ran, in order, or of `work` where that cannot be watched.
        rows: The table, times without the profiler's cost.
        busy: Milliseconds of the rows by phase.
        recording: One recorded step; None for backends with counters of their own.
        joined: Its calls.
        layers: What the backend's own counters said.
        layer_scale: Factor from the counters to the undisturbed step.
        transfer_ms: Copies between host and device.
        waited_ms: Waiting for other processes.
        read_backs: Source line of each value that the step takes out of a tensor.
        energy_j: Of one step; None where no counter can be read.
    """

    times: list[StepTime]
    step_ms: Estimate
    parts: dict[Part, float]
    work: Work | None
    operators: list[Operator]
    rows: list[Row]
    busy: dict[Phase, float]
    recording: Recording | None = None
    joined: list[Joined] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    layer_scale: float = 1.0
    cost: ProfilerCost | None = None
    transfer_ms: float = 0.0
    waited_ms: float = 0.0
    read_backs: list[str] = field(default_factory=list)
    energy_j: float | None = None


def measure_subject(subject: Subject, *, steps: int, say: Say = lambda _: None) -> Measured:
    """Time and look into a subject whose conditions are in force.

    Args:
        subject: One step.
        steps: Undisturbed steps to time.
        say: Told what is going on.
    """
    say("counting the work")
    work = work_of(subject)
    sync = subject.sync()
    say("compiling and warming up" if subject.compiled else "warming up")
    with named_kernels() if subject.compiled else nullcontext():
        go_on = _keeping_step(subject, sync)
        _warm_up(subject, sync, go_on)
    say(f"timing {steps} steps undisturbed")
    energy = find_device(subject.device).energy_j
    before = energy()
    times = time_steps(
        subject.step,
        steps=steps,
        max_seconds=_TIME_SECONDS,
        first=subject.first,
        sync=sync,
        go_on=go_on,
    )
    after = energy()
    if len(times) < steps:
        subject.notes.append(
            f"{len(times)} of {steps} steps were timed: no more went into {_TIME_SECONDS:.0f} s"
        )
    models = [] if subject.model is None else [subject.model]
    operators = work.operators if work is not None else ()
    found = Measured(
        times=times,
        step_ms=median_interval([t.ms for t in times]),
        parts=typical_parts(times),
        work=work,
        operators=placed(operators, places_of(models), subject.called_from),
        rows=[],
        busy={},
        energy_j=(after - before) / len(times)
        if before is not None and after is not None
        else None,
    )
    if subject.layers is not None:
        say("reading the backend's own counters")
        _from_layers(subject, found)
    else:
        say("recording the operators")
        _from_recording(subject, found, sync, go_on)
    return found


def _keeping_step(subject: Subject, sync: Callable[[], object] | None) -> GoOn:
    """How the number of steps is decided: where processes take them together, by the first one."""
    shares = subject.stepper is not None and subject.stepper.replicas.world > 1
    if not processes.several() or not (shares or subject.own is not None):
        return bool
    kind = subject.device.partition(":")[0]
    (one,) = record_steps(subject.step, steps=1, first=subject.first, device=kind, sync=sync)
    if not processes.takes_part(one):
        return bool
    group = torch.distributed
    subject.notes.append(
        f"of {group.get_world_size()} processes that with the number {group.get_rank()} is "
        "profiled: how long it waits for the others is its own"
    )
    subject.together = True
    return processes.as_the_first_says(subject.device)


@contextmanager
def named_kernels() -> Iterator[None]:
    """Have Inductor name the kernels that it makes for a CPU, so that a profiler sees them."""
    from torch._inductor import config

    use_inductor_cache()
    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def _warm_up(subject: Subject, sync: Callable[[], object] | None, go_on: GoOn) -> None:
    end = time.perf_counter() + _WARM_SECONDS
    for count in range(1000):
        subject.run()
        if sync is not None:
            sync()
        if not go_on(count + 1 < _WARM_STEPS or time.perf_counter() < end):
            break


# -- torch's profiler -----------------------------------------------------------------------------


def _from_recording(
    subject: Subject, found: Measured, sync: Callable[[], object] | None, go_on: GoOn
) -> None:
    kind = subject.device.partition(":")[0]
    recordings = record_steps(
        subject.step,
        steps=_RECORDED,
        first=subject.first,
        device=kind,
        sync=sync,
        max_seconds=_RECORD_SECONDS,
        go_on=go_on,
    )
    step_ms = found.step_ms.p50
    recorded_ms = median(r.ms for r in recordings)
    found.cost = ProfilerCost(step_ms=recorded_ms, cost=recorded_ms / step_ms - 1)
    usual = min(recordings, key=lambda r: abs(r.ms - recorded_ms))
    if subject.compiled:
        _from_compiled(found, recordings, recordings.index(usual))
    else:
        _watch(subject, found)
        joined = [joining.join(r, found.operators) for r in recordings]
        found.joined = joined[recordings.index(usual)]
        found.rows = rows.grouped(
            [joining.brought_to(j, r, step_ms) for j, r in zip(joined, recordings, strict=True)]
        )
    found.recording = usual
    found.transfer_ms = sum(ms for _, ms in joining.transfers(usual))
    found.waited_ms = processes.waited_ms(usual, found.joined)
    _with_update(subject, found)
    on_device = kind != "cpu"
    phases: tuple[Phase, ...] = ("forward", "backward", "optimizer")
    for phase in phases:
        part = step_ms if on_device else found.parts[phase]
        found.busy[phase] = rows.fitted(found.rows, phase, part)
    if on_device:  # streams overlap: their kernels may add up to more than the step
        rows.within(found.rows, found.busy, step_ms - found.transfer_ms)


def _watch(subject: Subject, found: Measured) -> None:
    """Replace the operators as written by those that really run, where they can be watched."""

    def run(begin: SetPhase) -> None:
        def mark(part: Part) -> None:
            begin(None if part == "data" else part)

        mark(subject.first)
        subject.step(mark)

    try:
        record = record_step(run, subject.watched)
        places = places_of(subject.watched)
        found.operators = placed(record.operators, places, subject.called_from)
        found.read_backs = record.read_backs
        if subject.own is not None:
            subject.plan = subject.own.plan_seen(subject.plan, record.operators)
    except CaptureError as error:
        subject.notes.append(f"operators are those of the model as written: {error}")


def _with_update(subject: Subject, found: Measured) -> None:
    """One row for the whole update, with the work that the optimiser's formula has."""
    update = [row for row in found.rows if row.phase == "optimizer"]
    if not update:
        return
    counted = [] if found.work is None else found.work.operators
    operators = [op for op in counted if op.phase == "optimizer"]
    # a step of the user's own calls the update itself; else the line that makes the optimiser
    called = (op.source for op in found.operators if op.phase == "optimizer" and op.source)
    found.rows = [row for row in found.rows if row.phase != "optimizer"]
    largest = max(update, key=lambda row: row.ms)
    found.rows.append(
        Row(
            name=operators[0].name if operators else largest.name,
            phase="optimizer",
            source=subject.update_line or next(called, subject.called_from),
            count=sum(row.count for row in update),
            ms=sum(row.ms for row in update),
            operators=operators,
            kernel=largest.name,
        )
    )


# -- compiled code and engines --------------------------------------------------------------------


def _from_compiled(found: Measured, recordings: Sequence[Recording], usual: int) -> None:
    """Kernels of torch.compile, with the operators of the model as written."""
    steps = []
    for recording in recordings:
        joined = joining.join(recording, ())
        steps.append(joining.brought_to(joined, recording, found.step_ms.p50))
    found.joined = steps[usual]
    update = [j for j in steps[0] if j.phase == "optimizer"]
    found.rows = rows.grouped([update]) if update else []
    phases: tuple[Phase, ...] = ("forward", "backward")
    for phase in phases:
        layers = _layers_of([[j for j in step if j.phase == phase] for step in steps])
        operators = [op for op in found.operators if op.phase == phase]
        found.rows += spread(layers, operators, phase)


def _layers_of(steps: Sequence[Sequence[Joined]]) -> list[LayerTime]:
    """Kernels in order; the time of each is the median over the steps where they agree."""
    first = steps[0]
    alike = [s for s in steps if [j.node.name for j in s] == [j.node.name for j in first]]
    return [
        LayerTime(
            name=j.node.name,
            kind=j.node.name.rpartition("::")[2],
            time_ms=median(step[i].ms for step in alike),
        )
        for i, j in enumerate(first)
    ]


def _from_layers(subject: Subject, found: Measured) -> None:
    assert subject.layers is not None
    found.layers = subject.layers()
    total = sum(layer.time_ms for layer in found.layers)
    step_ms = found.step_ms.p50
    if total <= 0:
        subject.notes.append(f"{subject.plan.title} has no counters: the step is one piece")
        found.layers = [LayerTime(name="the whole call", kind="call", time_ms=step_ms)]
        total = step_ms
    streams = getattr(subject.plan, "streams", 1) > 1 or getattr(subject.plan, "sub_batch", 0) > 0
    if total > step_ms or streams:
        # counters cost time of their own, and count one stream where several share the step
        found.layer_scale = step_ms / total
    operators = [op for op in found.operators if op.phase == "forward"]
    found.rows = spread(found.layers, operators)
    for row in found.rows:
        row.ms *= found.layer_scale
    found.busy["forward"] = rows.fitted(found.rows, "forward", step_ms)
