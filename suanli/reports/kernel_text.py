"""Results of `suanli kernel` as text for a terminal, made to fit 80 columns."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from suanli.base import units
from suanli.base.kernel_results import (
    CopyOverlap,
    KernelArch,
    KernelCase,
    KernelCheckResult,
    KernelExplainResult,
    KernelFinding,
    KernelLimiter,
    KernelTrial,
    KernelTuneResult,
)
from suanli.reports.live import STYLES, Live

__all__ = ["Live", "check", "explain", "tune"]

_WIDEST = 110
_MOST_TRIALS = 12
_MOST_PRINTED = 12
_BAR = 40  # columns of a timeline
_MARKS = {"host_to_device": ">", "kernel": "#", "device_to_host": "<"}


# -- suanli kernel explain ------------------------------------------------------------------------


def explain(result: KernelExplainResult, console: Console | None = None) -> None:
    """Print what a kernel needs and what bounds it."""
    out = console or _console()
    title = f"{result.kernel} ({result.language}) at {_named(result.sizes)} in {result.dtype}"
    out.print(Text(title, "bold"))
    if result.grid:
        shape = f"grid {_by(result.grid)}, block {_by(result.block)}"
        out.print(Text(f" {shape}{_with(result.config)}", "dim"))
    out.print(_archs(result.archs, out.width))
    for row in result.archs:
        if row.occupancy and row.occupancy.lift:
            _say(out, row.arch, f"one more block would fit with {row.occupancy.lift}")
        if row.status != "compiled":
            _say(out, row.arch, f"{row.status}: {row.reason}")
    if any(row.instructions for row in result.archs):
        out.print(Text(" instructions (wide: 16-byte loads)", "dim"))
        out.print(_mixes(result.archs, out.width))
    _print_rooflines(out, result.archs)
    if result.limiter:
        _print_limiter(out, result.limiter)
    _print_findings(out, result.findings)
    _print_overlap(out, result.overlap)
    _print_notes(out, (*result.notes, "Nothing was timed: these are the compiler's figures."))


def _archs(rows: Sequence[KernelArch], width: int) -> Table:
    table = _table(width)
    table.add_column("arch")
    several = len({row.function for row in rows}) > 1
    if several:
        table.add_column("function", overflow="fold")
    for name in ("regs", "spills", "shared", "blocks", "occupancy"):
        table.add_column(name, justify="right")
    table.add_column("limited by", overflow="fold")
    for row in rows:
        if row.status != "compiled" or row.occupancy is None:
            continue
        table.add_row(
            row.arch,
            *[row.function] * several,
            str(row.registers),
            units.size(row.spill_store_bytes + row.spill_load_bytes),
            units.size(row.static_shared_bytes + row.dynamic_shared_bytes),
            str(row.occupancy.blocks),
            units.percent(row.occupancy.fraction, 0),
            row.occupancy.limited_by,
        )
    return table


def _mixes(rows: Sequence[KernelArch], width: int) -> Table:
    table = _table(width)
    table.add_column("arch")
    for name in ("all", "tensor", "loads", "wide", "shared", "local", "atomic", "barrier"):
        table.add_column(name, justify="right")
    for row in rows:
        mix = row.instructions
        if mix is None:
            continue
        counts = (mix.total, mix.tensor_core, mix.global_loads, mix.wide_loads, mix.shared)
        table.add_row(row.arch, *map(str, (*counts, mix.local, mix.atomics, mix.barriers)))
    return table


def _print_rooflines(out: Console, rows: Iterable[KernelArch]) -> None:
    seen = set()
    for row in rows:
        roof = row.roofline
        if roof is None or roof.gpu in seen:
            continue
        seen.add(roof.gpu)
        _say(
            out,
            "roofline",
            f"{roof.gpu}: {roof.arithmetic_intensity:.3g} operations a byte, the ridge for "
            f"{roof.dtype} is at {roof.ridge:.3g}: bound by {roof.bound_by}, at best "
            f"{units.milliseconds(roof.sol_ms)} (datasheet)",
        )


def _print_limiter(out: Console, limiter: KernelLimiter) -> None:
    _say(out, "limiter", f"{limiter.name} on {limiter.gpu}: {limiter.text}")
    shares = ", ".join(
        f"{name} {units.milliseconds(ms)}"
        for name, ms in sorted(limiter.unit_ms.items(), key=lambda item: -item[1])
        if ms > 0
    )
    _say(out, "", f"by unit (static model): {shares}")


def _print_findings(out: Console, findings: Iterable[KernelFinding]) -> None:
    for finding in findings:
        where = f"{finding.where}: " if finding.where else ""
        style = "red" if finding.severity == "error" else "yellow"
        _say(out, finding.severity, f"{where}{finding.text}", style)


def _print_overlap(out: Console, overlaps: Sequence[CopyOverlap]) -> None:
    if not overlaps:
        return
    for overlap in overlaps:
        name = "stream" if overlap.streams == 1 else "streams"
        _say(
            out,
            f"{overlap.streams} {name}",
            f"{units.milliseconds(overlap.total_ms)} with both copies in {overlap.chunks} chunks",
        )
    widest = overlaps[-1]
    for stream in range(widest.streams):
        out.print(Text(f"    {stream} {_timeline(widest, stream)}"))
    _say(out, "", "> to the card, # kernel, < back; simulated: " + widest.assumptions, "dim")


def _timeline(overlap: CopyOverlap, stream: int) -> str:
    line = [" "] * _BAR
    for slot in overlap.slots:
        if slot.stream != stream:
            continue
        begin = int(slot.begin_ms / overlap.total_ms * _BAR)
        end = max(begin + 1, int(slot.end_ms / overlap.total_ms * _BAR))
        line[begin:end] = _MARKS[slot.what] * (min(end, _BAR) - begin)
    return "|" + "".join(line[:_BAR]) + "|"


# -- suanli kernel check --------------------------------------------------------------------------


def check(result: KernelCheckResult, console: Console | None = None) -> None:
    """Print whether a kernel is right, and what it does wrong."""
    out = console or _console()
    table = _table(out.width)
    for name in ("sizes", "dtype", "config", "status"):
        table.add_column(name, overflow="fold")
    table.add_column("error/bound", justify="right")
    for case in result.cases:
        share = "" if case.error_share is None else f"{case.error_share:.2g}"
        table.add_row(
            _named(case.sizes),
            case.dtype,
            _named(case.config),
            Text(case.status, STYLES.get(case.status, "")),
            share,
        )
    out.print(table)
    for reason in dict.fromkeys(case.reason for case in result.cases if case.reason):
        _say(out, "", reason, "red")
    _print_findings(out, _distinct(result.cases))
    _print_printed(out, result.cases)
    verdict = "is right in every case that could be judged" if result.ok else "is not verified"
    style = "bold green" if result.ok else "bold red"
    out.print(Text(f"{result.kernel} ({result.language}) {verdict}", style))
    _print_notes(out, result.notes)


def _print_printed(out: Console, cases: Iterable[KernelCase]) -> None:
    """What the first case printed that printed anything."""
    lines = next((case.printed.splitlines() for case in cases if case.printed), [])
    for line in lines[:_MOST_PRINTED]:
        _say(out, "printed", line)
    if len(lines) > _MOST_PRINTED:
        _say(out, "", f"and {len(lines) - _MOST_PRINTED} more lines (--json has them)", "dim")


def _distinct(cases: Iterable[KernelCase]) -> list[KernelFinding]:
    """Each finding once, those that a case already gives as its reason left out."""
    found: dict[tuple[str, str], KernelFinding] = {}
    for case in cases:
        for finding in case.findings:
            if not case.reason.endswith(finding.text):
                found.setdefault((finding.kind, finding.where), finding)
    return list(found.values())


# -- suanli kernel tune ---------------------------------------------------------------------------


def tune(result: KernelTuneResult, console: Console | None = None) -> None:
    """Print the fastest configurations, or the ranking."""
    out = console or _console()
    title = f"{result.kernel} at {_named(result.sizes)} in {result.dtype}: {result.where}"
    out.print(Text(title, "bold"))
    table = _table(out.width)
    table.add_column("config", overflow="fold")
    table.add_column("status")
    for name in ("measured", "model", "occupancy"):
        table.add_column(name, justify="right")
    shown = sorted(result.trials, key=_speed)[:_MOST_TRIALS]
    for trial in shown:
        step = units.milliseconds(trial.step_ms.p50) if trial.step_ms else ""
        model = units.milliseconds(trial.predicted_ms) if trial.predicted_ms else ""
        share = "" if trial.occupancy is None else units.percent(trial.occupancy, 0)
        status = Text(trial.status, STYLES.get(trial.status, ""))
        table.add_row(_named(trial.config), status, step, model, share)
    out.print(table)
    if len(result.trials) > len(shown):
        out.print(Text(f" and {len(result.trials) - len(shown)} more (--json has all)", "dim"))
    if result.config is not None:
        what = "first" if result.ranking else "winner"
        rank = "of the ranking: " if result.ranking else ""
        state = "its answer was verified" if result.verified else "its answer was not verified"
        _say(out, what, f"{rank}{_named(result.config)}; {state}")
    for rival in result.rivals:
        speedup = f"{rival.speedup.p50:.2f}x ({rival.speedup.lo95:.2f} to {rival.speedup.hi95:.2f})"
        _say(out, "against", f"{rival.name}: {speedup}")
    _print_notes(out, result.notes)


def _speed(trial: KernelTrial) -> tuple[int, float]:
    if trial.step_ms is not None and trial.status == "verified":
        return 0, trial.step_ms.p50
    if trial.step_ms is not None:
        return 1, trial.step_ms.p50
    usable = trial.status in ("ranked", "pruned") and trial.predicted_ms is not None
    return (2, trial.predicted_ms or 0.0) if usable else (3, 0.0)


# -- parts ----------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _table(width: int) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, width=min(width, _WIDEST))


def _say(out: Console, name: str, words: str, style: str = "") -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.width = min(out.width, _WIDEST) - 2
    grid.add_column(width=10)
    grid.add_column(ratio=1, overflow="fold")
    grid.add_row(Text(f" {name}"), Text(words, style))
    out.print(grid)


def _print_notes(out: Console, notes: Iterable[str]) -> None:
    for note in notes:
        _say(out, "note", note, "dim")


def _named(values: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _with(config: dict[str, int]) -> str:
    return f", {_named(config)}" if config else ""


def _by(extents: Sequence[int]) -> str:
    kept = list(extents)
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return "x".join(map(str, kept))
