"""`suanli profile` as text: one screen."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from suanli.base import units
from suanli.base.profile_results import (
    Advice,
    MemoryProfile,
    OperatorProfile,
    ProfileResult,
    Stability,
)
from suanli.base.timing import Estimate
from suanli.reports.layout import Line, console, lines, table

_MOST_ROWS, _LEAST_SHARE = 12, 0.01
_MOST_ADVICE = 6
_MOST_OUTLIERS = 3
_KINDS = ("weights", "gradients", "optimizer", "activations", "workspace")


def profile(result: ProfileResult, out: Console | None = None) -> None:
    """Print a profile: the verdict, the parts, the largest operators, the advice."""
    out = out or console()
    kind = "training" if result.training else "inference"
    about = f", {kind}, batch {result.batch}, {_title(result)}, on {result.device.title}"
    out.print(Text.assemble((result.workload, "bold"), about))
    out.print(lines(_findings(result), out.width))
    out.print()
    out.print(_operators(result, out.width))
    if result.advice:
        out.print(lines(_advice(result.advice), out.width))
    notes: list[Line] = [("note", words) for words in result.notes]
    if result.interrupted:
        notes.append(("note", "stopped before all advice was tried"))
    if notes:
        out.print(lines(notes, out.width, style="dim"))


def _title(result: ProfileResult) -> str:
    plan = result.plan
    return plan.as_plan().title if hasattr(plan, "as_plan") else plan.title


def _findings(result: ProfileResult) -> list[Line]:
    step = result.step_ms
    found: list[Line] = [
        ("verdict", Text(result.verdict, "bold")),
        ("step", f"{_interval(step)}, {units.rate(result.samples_per_s)} samples/s"),
    ]
    if result.sol is not None and result.sol.fraction is not None:
        share = units.share(result.sol.fraction)
        limit = f"{units.milliseconds(result.sol.ms)}: the step is at {share} of the speed of light"
        found.append(("limit", limit))
    found.append(("parts", _parts(result)))
    if result.lost:
        found.append(("lost to", _lost(result)))
    if result.memory is not None:
        found.append(("memory", _memory(result.memory)))
    found.append(("steady", _steady(result.stability)))
    energy = "unknown" if result.energy_j is None else f"{result.energy_j:.3g} J a step"
    found.append(("energy", energy))
    if result.profiler is not None:
        cost = f"{result.profiler.cost:+.1%} while operators were recorded; times are without it"
        found.append(("profiler", cost))
    return found


def _interval(step: Estimate) -> str:
    low, high = units.milliseconds(step.lo95), units.milliseconds(step.hi95)
    return f"{units.milliseconds(step.p50)} ({low} to {high})"


def _parts(result: ProfileResult) -> str:
    times, whole = result.categories, result.step_ms.p50
    named = {
        "forward": times.forward_ms,
        "backward": times.backward_ms,
        "optimiser": times.optimizer_ms,
        "data": times.data_ms,
        "transfer": times.transfer_ms,
        "communication": times.communication_ms,
        "between operators": times.idle_ms,
    }
    return ", ".join(
        f"{name} {units.milliseconds(ms)} ({ms / whole:.0%})"
        for name, ms in named.items()
        if ms >= 0.001 * whole
    )


def _lost(result: ProfileResult) -> str:
    whole = result.step_ms.p50
    listed = sorted(result.lost, key=lambda item: -item.ms)
    return ", ".join(
        f"{item.cause} {item.ms / whole:.0%}" for item in listed if item.ms >= 0.01 * whole
    )


def _memory(memory: MemoryProfile) -> str:
    sizes = {kind: getattr(memory, f"{kind}_bytes") for kind in _KINDS}
    kinds = ", ".join(f"{kind} {units.size(size)}" for kind, size in sizes.items() if size)
    said = f"{units.size(memory.total_bytes)} at most: {kinds}"
    if memory.predicted is not None and memory.total_bytes:
        off = memory.predicted.total_bytes / memory.total_bytes - 1
        said += f"; predicted {units.size(memory.predicted.total_bytes)} ({off:+.0%})"
    return said


def _steady(found: Stability) -> str:
    said = f"spread {found.spread:.1%} over {found.steps} steps"
    if not found.outliers:
        return f"{said}, no outliers"
    listed = [
        f"step {slow.step}: {units.milliseconds(slow.ms)}"
        + (f", {slow.cause}" if slow.cause else "")
        for slow in found.outliers[:_MOST_OUTLIERS]
    ]
    more = len(found.outliers) - len(listed)
    return f"{said}; {'; '.join(listed)}" + (f"; {more} more" if more else "")


def _operators(result: ProfileResult, width: int) -> Table:
    made = table(width)
    made.add_column("operator", ratio=5, overflow="fold")
    made.add_column("where", ratio=5, overflow="fold")
    made.add_column("time", justify="right", no_wrap=True)
    made.add_column("step", justify="right", no_wrap=True)
    made.add_column("bound by", no_wrap=True)
    made.add_column("of limit", justify="right", no_wrap=True)
    shown = [row for row in result.operators if row.share >= _LEAST_SHARE][:_MOST_ROWS]
    for row in shown:
        made.add_row(
            _name(row, result.training),
            Text(" ".join(part for part in (row.module, row.source) if part), "dim"),
            units.milliseconds(row.time_ms),
            f"{row.share:.0%}",
            row.bound_by,
            _of_limit(row),
        )
    rest = [row for row in result.operators if row not in shown]
    if rest:
        ms = sum(row.time_ms for row in rest)
        share = f"{ms / result.step_ms.p50:.0%}"
        made.add_row(f"{len(rest)} more", "", units.milliseconds(ms), share, "", "", style="dim")
    return made


def _name(row: OperatorProfile, training: bool) -> Text:
    times = f" x{row.count}" if row.count > 1 else ""
    fused = f" +{len(row.fused) - 1} fused" if len(row.fused) > 1 else ""
    phase = f" {row.phase}" if training and not row.name.endswith("backward") else ""
    return Text.assemble(row.name, (f"{times}{fused}{phase} {row.dtype}", "dim"))


def _of_limit(row: OperatorProfile) -> str:
    if not row.sol_ms or not row.time_ms:
        return ""
    return units.share(min(row.sol_ms / row.time_ms, 1.0))


def _advice(advice: tuple[Advice, ...]) -> list[Line]:
    listed: list[Line] = []
    for index, item in enumerate(advice[:_MOST_ADVICE], 1):
        gain = f"expected {item.expected_speedup:.2f}x"
        if item.measured_speedup is not None:
            measured = item.measured_speedup
            gain += f", measured {measured.p50:.2f}x ({measured.lo95:.2f} to {measured.hi95:.2f})"
        if item.failed:
            gain += f", could not be tried: {item.failed}"
        words = Text.assemble((item.change, "bold"), f": {gain}. ", item.reason)
        words.append(f". {item.how}", "dim")
        listed.append((f"change {index}", words))
    return listed
