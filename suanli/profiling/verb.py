"""The verb `profile`: passes, table, verdict, advice and, where asked, the proof of the advice."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceilings
from suanli.base.profile_results import (
    Advice,
    MemoryProfile,
    OperatorProfile,
    ProfileResult,
    TraceEvent,
)
from suanli.base.work import SpeedOfLight
from suanli.cost import speed_of_light
from suanli.devices import GpuDevice, find_sheet
from suanli.devices import device as find_device
from suanli.measure.environment import environment
from suanli.profiling import rows, trace
from suanli.profiling.advice import Case, advise
from suanli.profiling.checking import RACE_SECONDS, Checker, Remake
from suanli.profiling.expected import Basis
from suanli.profiling.measuring import Measured, measure_subject
from suanli.profiling.memory import memory_profile
from suanli.profiling.stability import stability
from suanli.profiling.subjects import Subject
from suanli.profiling.verdict import bound_by, lost_time, step_times, verdict

_FASTER = 1.15  # ceilings of another precision must be so much higher to be worth a word
_ORDER = ("bf16", "fp16", "tf32", "int8")


@dataclass(frozen=True, kw_only=True)
class Profiler:
    """One call of `profile`.

    Attributes:
        steps: Undisturbed steps to time.
        checks: How many pieces of advice to try.
        check_seconds: Time for each of them.
        ceilings: Of the device; None where they are not known.
        compiler: Whether torch.compile can be used here.
        remake: Makes the same step under another plan; None where it cannot be made again.
        listener: Told what is going on.
    """

    steps: int
    checks: int
    ceilings: Ceilings | None
    compiler: bool
    remake: Remake | None
    listener: Listener
    check_seconds: float = RACE_SECONDS

    def run(self, subject: Subject) -> ProfileResult:
        """Profile a subject; the caller closes it."""
        started = time.monotonic()
        with subject.conditions():
            measured = measure_subject(subject, steps=self.steps, say=self._say)
            self._say("following the memory")
            memory = memory_profile(subject, measured.work)
        result, case = self._result(subject, measured, memory, started)
        advice: Sequence[Advice] = advise(case) if case is not None else ()
        interrupted = False
        if self.checks and self.remake is not None:
            checker = Checker(
                subject=subject,
                remake=self.remake,
                most=self.checks,
                say=self._say,
                seconds=self.check_seconds,
            )
            advice, interrupted = checker.checked(advice)
        tried = any(item.measured_speedup or item.failed for item in advice)
        if self.checks and not tried and not interrupted:
            why = "no change here is one of plan or batch" if self.remake else "it exists only once"
            result = replace(result, notes=(*result.notes, f"nothing was tried: {why}"))
        return _with(result, advice, interrupted, time.monotonic() - started)

    def _say(self, text: str) -> None:
        self.listener(Event(kind="step", text=text))

    def _result(
        self,
        subject: Subject,
        measured: Measured,
        memory: MemoryProfile | None,
        started: float,
    ) -> tuple[ProfileResult, Case | None]:
        step_ms, device = measured.step_ms, find_device(subject.device)
        times = step_times(
            measured.parts,
            measured.busy,
            transfer_ms=measured.transfer_ms,
            waited_ms=measured.waited_ms,
            device_bound=subject.device != "cpu",
        )
        sol = self._sol(subject, measured)
        table = rows.finished(
            measured.rows,
            step_ms=step_ms.p50,
            ceilings=self.ceilings,
            precision=subject.plan.precision,
        )
        bound = bound_by(times, table)
        work, limits = measured.work, self.ceilings
        unmatched = sum(row.ms for row in measured.rows if not row.operators)
        result = ProfileResult(
            schema=schema.name("profile"),
            verb="profile",
            workload=subject.name,
            device=device.info,
            environment=environment(),
            subject=subject.kind,
            training=subject.training,
            batch=subject.batch,
            plan=subject.plan,
            step_ms=step_ms,
            samples_per_s=1e3 * subject.batch / step_ms.p50,
            sol=sol,
            verdict=verdict(bound, times, measured.rows, sol, step_ms.p50),
            bound_by=bound,
            categories=times,
            operators=tuple(table),
            lost=lost_time(times, table, sol),
            advice=(),
            memory=memory,
            stability=stability(measured.times),
            profiler=measured.cost,
            energy_j=measured.energy_j,
            ceilings=limits.items if limits is not None else (),
            flops=max(work.flops if work is not None else 0, sum(row.flops for row in table)),
            parameters=work.parameters if work is not None else 0,
            seconds_spent=time.monotonic() - started,
            trace=_trace(measured, table),
            untraced_ms=unmatched,
            notes=tuple(dict.fromkeys(subject.notes)),
        )
        if limits is None:
            return result, None
        basis = Basis(
            rows=measured.rows,
            times=times,
            ceilings=limits,
            plan=subject.plan,
            batch=subject.batch,
            sheet=_sheet(subject.device),
        )
        case = Case(
            subject=subject,
            measured=measured,
            basis=basis,
            faster=faster(limits, subject.plan.precision),
            compiler=self.compiler,
        )
        return result, case

    def _sol(self, subject: Subject, measured: Measured) -> SpeedOfLight | None:
        if self.ceilings is None or measured.work is None:
            return None
        try:
            return speed_of_light(
                measured.work,
                self.ceilings,
                precision=subject.plan.precision,
                measured_ms=measured.step_ms.p50,
            )
        except BadInputError:
            return None


def faster(ceilings: Ceilings, precision: str) -> tuple[str, ...]:
    """Precisions whose products the device does faster than this one's, the fastest float first."""
    now = ceilings.peak_flops(precision) or 0.0
    rates = {name: ceilings.peak_flops(name) or 0.0 for name in _ORDER}
    found = [name for name in _ORDER if name != precision and rates[name] > _FASTER * now]
    floats = [name for name in found if name != "int8"]
    return (*sorted(floats, key=lambda name: -rates[name]), *(n for n in found if n == "int8"))


def _trace(measured: Measured, table: list[OperatorProfile]) -> tuple[TraceEvent, ...]:
    if measured.recording is not None:
        return trace.timeline(measured.recording, measured.joined, table)
    return trace.of_layers(measured.layers, table, measured.layer_scale)


def _sheet(device: str) -> GpuSheet | None:
    if device == "cpu":
        return None
    found = find_device(device)
    if not isinstance(found, GpuDevice):
        return None
    try:
        return find_sheet(found.gpu.name)
    except BadInputError:
        return None


def _with(
    result: ProfileResult, advice: Sequence[Advice], interrupted: bool, seconds: float
) -> ProfileResult:
    return replace(result, advice=tuple(advice), interrupted=interrupted, seconds_spent=seconds)
