"""Results as text for a terminal of 80 columns, and the live view of long work."""

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from suanli.base import units
from suanli.base.events import Event
from suanli.base.hardware import Ceiling
from suanli.base.results import DoctorResult, OptimizeResult, RunResult, WorkloadEntry
from suanli.base.timing import Estimate
from suanli.base.trial import Quality, Trial

_STYLES = {"verified": "green", "rejected": "yellow", "failed": "red", "skipped": "dim"}


class Live:
    """Shows events on standard error as they come: a line per trial, the present step below.

    Where standard error is no terminal every step is a line, so that a log shows progress too.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._started = time.monotonic()
        self._last = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def event(self, event: Event) -> None:
        """Show one event."""
        if self._quiet:
            return
        if event.trial is not None:
            self._console.print(trial_line(event.trial), soft_wrap=True)
        elif event.kind == "note":
            self._console.print(f"[yellow]note:[/] {escape(event.text)}", soft_wrap=True)
        elif self._status is not None:
            self._status.update(escape(_clock(event, self._started)))
        elif event.text != self._last:
            self._console.print(escape(_clock(event, self._started)), soft_wrap=True)
        self._last = event.text


def _clock(event: Event, started: float) -> str:
    spent = time.monotonic() - started if event.spent_s is None else event.spent_s
    total = f"/{event.budget_s:.0f}" if event.budget_s else ""
    return f"{spent:4.0f}{total} s  {event.text}"


def trial_line(trial: Trial) -> str:
    """One trial as one line of markup."""
    style = _STYLES[trial.status]
    title = trial.plan.title[:38]
    when = f"{trial.seconds_spent:4.0f} s" if trial.seconds_spent >= 0.5 else "      "
    figure = units.milliseconds(trial.step_ms.p50) if trial.step_ms else ""
    line = f"  {escape(title):38} [{style}]{trial.status:8}[/] {figure:>9} {when}"
    if trial.reason:
        line += f"  [dim]{escape(trial.reason[:110])}[/]"
    return line


def optimize(result: OptimizeResult) -> None:
    """Print what `suanli optimize` found."""
    console = Console(highlight=False)
    console.print()
    console.print(_trials(result.trials))
    chosen, plan = result.chosen, result.chosen.plan
    console.print(f"[bold]{escape(result.workload)}[/], batch {result.batch}, {result.objective}")
    console.print(f"  plan         [bold]{escape(plan.title)}[/]  ({plan.key})")
    step = units.milliseconds(chosen.step_ms.p50)
    console.print(f"  step         {step}, {chosen.samples_per_s:,.0f} samples/s")
    console.print(f"  speed-up     [bold]{ratio(result.speedup_vs_eager)}[/] over eager fp32")
    console.print(
        f"               {ratio(result.speedup_vs_best_baseline)} over the best baseline, "
        f"{escape(result.baseline.plan.title)}"
    )
    for other in result.confirmations[1:]:
        console.print(
            f"  at batch {other.batch:<4}{ratio(other.speedup_vs_eager)} over eager fp32, "
            f"{ratio(other.speedup_vs_best_baseline)} over {escape(other.best_baseline.title)}"
        )
    if result.sol is not None and result.sol.fraction is not None:
        console.print(
            f"  limit        {units.milliseconds(result.sol.ms)} ({result.sol.bound_by}); "
            f"this is {result.sol.fraction * 100:.0f} % of the speed of light"
        )
    _print_correctness(console, result)
    for note in result.notes:
        console.print(f"  [yellow]note[/]         {escape(note)}")
    if result.engine_dir:
        console.print(f"\nThe engine is in [bold]{escape(result.engine_dir)}[/]. Call it with\n")
        console.print("  import suanli", soft_wrap=True)
        console.print(f'  engine = suanli.load("{escape(result.engine_dir)}")', soft_wrap=True)
        console.print("  result = engine(inputs)\n")


def _print_correctness(console: Console, result: OptimizeResult) -> None:
    if result.values is not None and result.values.outputs:
        worst = max(result.values.outputs, key=lambda output: output.rms_ratio)
        batches = ", ".join(str(batch) for batch in result.values.batches)
        console.print(
            f"  values       error {worst.rms_ratio:.2f}x eager's own at this "
            f"precision ({result.values.k:g}x is allowed)\n"
            f"               checked in a fresh process at batch {batches}"
        )
    if result.quality is not None:
        _print_quality(console, result.quality)
    elif result.untrained:
        console.print("  quality      not judged: the weights are random")


def _print_quality(console: Console, quality: Quality) -> None:
    console.print(
        f"  {quality.metric:12} {units.percent(quality.reference)} before, "
        f"[bold]{units.percent(quality.value)}[/] after ({quality.n} unseen samples,\n"
        f"               {quality.harmed} harmed, {quality.helped} helped); drop at most "
        f"{quality.drop_upper95 * 100:.2f} points (95 %),\n"
        f"               {quality.budget * 100:.2f} are allowed"
    )
    for alarm in quality.alarms:
        console.print(f"  [red]class[/]        {escape(alarm)}")


def ratio(estimate: Estimate) -> str:
    """`6.52x (6.41 to 6.60)`."""
    return f"{estimate.p50:.2f}x ({estimate.lo95:.2f} to {estimate.hi95:.2f})"


def _trials(trials: Sequence[Trial]) -> Table:
    # the search's own timings only: the race's belong to another moment of the machine
    baselines = [_step(t) for t in trials if t.baseline and t.status == "verified" and t.step_ms]
    best_baseline_ms = min(baselines, default=float("nan"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=80)
    table.add_column("plan", ratio=5, overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("vs base", justify="right", no_wrap=True)
    table.add_column("outcome", ratio=6, overflow="fold")
    ran = sorted((t for t in trials if t.step_ms), key=_step)
    rest = [t for t in trials if not t.step_ms]
    for trial in [*ran, *rest]:
        style = _STYLES[trial.status]
        outcome = f"[{style}]{trial.status}[/]"
        if trial.baseline:
            outcome += " baseline"
        if trial.reason:
            outcome += f": {escape(trial.reason)}"
        figure = units.milliseconds(_step(trial)) if trial.step_ms else ""
        gain = f"{best_baseline_ms / _step(trial):.2f}x" if trial.step_ms else ""
        table.add_row(escape(trial.plan.title), figure, gain, outcome)
    return table


def _step(trial: Trial) -> float:
    assert trial.step_ms is not None
    return trial.step_ms.p50


def doctor(result: DoctorResult) -> None:
    """Print what `suanli doctor` found."""
    console = Console(highlight=False)
    cpu = result.cpu
    console.print(f"\n[bold]{escape(cpu.model)}[/]")
    cores = f"{cpu.usable_cores} usable of {cpu.logical_cores}"
    console.print(f"  cores     {cores}, memory {units.size(cpu.memory_bytes)}")
    console.print(f"  matrix    {escape(', '.join(cpu.features)) or 'none'}", soft_wrap=False)
    console.print(f"  compiler  {escape(result.compiler or 'none')}")
    for gpu in result.gpus:
        console.print(
            f"  {gpu.index}: {escape(gpu.name)}, {units.size(gpu.memory_bytes)}, "
            f"compute capability {gpu.compute_capability or 'unknown'}, driver {gpu.driver or '?'}"
        )
    if not result.gpus:
        console.print("  GPUs      none")
    console.print(_ceilings(result.ceilings))
    console.print(_backends(result))
    for problem in result.problems:
        console.print(f"[yellow]problem[/]  {escape(problem.what)}")
        console.print(f"         [bold]{escape(problem.mend)}[/]")
    if not result.problems:
        console.print("no problems found")


def _ceilings(ceilings: Sequence[Ceiling]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=80, title="Ceilings")
    table.add_column("what", no_wrap=True)
    table.add_column("hardware", justify="right", no_wrap=True)
    table.add_column("achieved", justify="right", no_wrap=True)
    table.add_column("spread", justify="right", no_wrap=True)
    table.add_column("mark", no_wrap=True)
    table.add_column("of datasheet", justify="right", no_wrap=True)
    for item in ceilings:
        what = " ".join(part for part in (item.what.replace("_", " "), item.dtype) if part)
        if item.working_set_bytes:
            what += f" {units.size(item.working_set_bytes)}"
        known = item.best
        share = f"{known / item.datasheet * 100:.0f} %" if item.datasheet and known else ""
        table.add_row(
            what,
            _rate(item.hardware, item),
            _rate(item.achieved, item),
            f"{item.spread * 100:.1f} %",
            item.mark,
            share,
        )
    return table


def _rate(value: float | None, item: Ceiling) -> str:
    if value is None:
        return ""
    if item.unit == "s":
        return units.milliseconds(value * 1e3)
    unit = "OP/s" if item.dtype == "int8" and item.unit == "FLOP/s" else item.unit
    return units.si(value, unit)


def _backends(result: DoctorResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=80, title="Backends")
    table.add_column("backend", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("", overflow="fold")
    for backend in result.backends:
        says = "" if backend.present else escape(backend.reason or backend.install)
        version = backend.version or ("present" if backend.present else "absent")
        table.add_row(escape(backend.name), escape(version), says)
    return table


def run(result: RunResult) -> None:
    """Print what `suanli run` computed."""
    console = Console(highlight=False)
    for name, shape, dtype in zip(
        result.output_names, result.output_shapes, result.output_dtypes, strict=True
    ):
        console.print(f"{name}: {list(shape)} {dtype}")
    console.print(f"{units.milliseconds(result.call_ms)} in one call")
    for line in result.differences:
        console.print(f"[yellow]differs[/]  {escape(line)}")
    if result.output:
        console.print(f"wrote {escape(result.output)}", soft_wrap=True)


def workloads(entries: Sequence[WorkloadEntry]) -> None:
    """Print the list of built-in workloads."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=80)
    table.add_column("workload", no_wrap=True)
    table.add_column("", overflow="fold")
    for entry in entries:
        table.add_row(entry.name, escape(entry.note))
    Console(highlight=False).print(table)


def line(text: Any) -> None:
    """One line on standard error."""
    sys.stderr.write(f"{text}\n")
