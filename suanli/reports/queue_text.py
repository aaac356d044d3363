"""The results of `suanli queue` as text."""

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from suanli.base import units
from suanli.base.queue_results import Job, QueueResult
from suanli.reports.layout import console as _console

_COLOURS = {"waiting": "yellow", "running": "cyan", "done": "green", "failed": "red"}


def queue(result: QueueResult, console: Console | None = None) -> None:
    """Print the jobs, one line each, and why those that failed did."""
    out = console or _console()
    if not result.jobs:
        out.print("No jobs: suanli queue add train WORKLOAD puts one in.")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("state")
    table.add_column("on")
    table.add_column("time", justify="right")
    table.add_column("memory", justify="right")
    table.add_column("command", overflow="fold")
    for job in result.jobs:
        table.add_row(
            str(job.id),
            Text(job.state, _COLOURS[job.state]),
            job.device or job.wanted,
            _time(job),
            _memory(job),
            job.words,
        )
    out.print(table)
    for job in result.jobs:
        if job.reason:
            out.print(Text(f"job {job.id}: {job.reason}", "yellow"), soft_wrap=True)
        if job.state == "failed" and job.log and job.starts:
            out.print(Text(f"job {job.id}: see {job.log}"), soft_wrap=True)


def _time(job: Job) -> str:
    """What it took, or took so far of what it needs."""
    spent = job.spent_s
    if job.state == "running" and job.started_s is not None:
        spent += max(0.0, time.time() - job.started_s)
    if job.state in ("done", "failed"):
        return _seconds(spent)
    seconds = _need(job, "seconds")
    expected = f"~{_seconds(seconds)}" if seconds is not None else "?"
    return f"{_seconds(spent)} of {expected}" if spent else expected


def _memory(job: Job) -> str:
    if job.peak_bytes is not None and job.state in ("done", "failed"):
        return units.size(job.peak_bytes)
    known = _need(job, "memory_bytes")
    return f"~{units.size(int(known))}" if known is not None else "?"


def _need(job: Job, name: str) -> float | None:
    """The least over the devices where it may run, or what it needs on its own."""
    needs = [job.need_on(job.device)] if job.device else list(job.needs)
    values = [getattr(need, name) for need in needs if job.wanted in ("auto", need.device)]
    known = [float(value) for value in values if value is not None]
    return min(known) if known else None


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
