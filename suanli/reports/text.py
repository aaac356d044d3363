"""Results as text for a terminal, made to fit 80 columns."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from suanli.base import units
from suanli.base.hardware import Ceiling, DeviceInfo, GpuInfo
from suanli.base.plan import Plan
from suanli.base.results import (
    DoctorResult,
    ExportResult,
    OptimizeResult,
    RunResult,
    TrustResult,
    WorkloadsResult,
)
from suanli.base.timing import Estimate
from suanli.base.train_results import TrainResult
from suanli.base.trial import Quality, Trial, ValueCheck
from suanli.base.work import SpeedOfLight
from suanli.reports.layout import Line
from suanli.reports.layout import console as _console
from suanli.reports.layout import lines as _lines
from suanli.reports.layout import table as _table
from suanli.reports.live import STYLES, Live

__all__ = ["Live", "doctor", "export", "optimize", "ratio", "run", "trust", "workloads"]

_MOST_SKIPPED = 12  # lines; the rest is counted
_MOST_NAMES = 4  # names in a line; the rest is counted
_MOST_REASON = 240  # characters of a reason; --json has all of it
_BUSY = 0.5  # spread of a ceiling from which on something else must have run beside it

# a figure with its unit, in the reasons of a search
_FIGURE = re.compile(r"(?<!\S)\d+(?:\.\d+)?(?= (?:s|ms|us|variations?)\b)")


# -- suanli optimize ------------------------------------------------------------------------------


def optimize(result: OptimizeResult, console: Console | None = None) -> None:
    """Print what `suanli optimize` found: the trials, the chosen plan, the proof."""
    out = console or _console()
    out.print(_trials(result.trials, result.chosen.plan, out.width))
    about = "Timed by the search. The figures further down are from a race on new timings."
    out.print(Text(f" {about}", "dim"))
    skipped = [trial for trial in result.trials if trial.status == "skipped"]
    if skipped:
        out.print()
        out.print(_lines(_skipped(skipped), out.width))
    out.print()
    title = f", batch {result.batch}, {result.objective}, on {result.device.title}"
    out.print(Text.assemble((result.workload, "bold"), title))
    out.print(_lines(_findings(result), out.width))
    if result.engine_dir:
        _print_usage(out, result.engine_dir)


def _trials(trials: Sequence[Trial], best: Plan, width: int) -> Table:
    """What was tried: the fastest verified plan first, then what was rejected and what failed."""
    tried = [trial for trial in trials if trial.status != "skipped"]
    # the search's own timings only: the race's belong to another moment of the machine
    steps = [_step(t) for t in tried if t.baseline and t.status == "verified"]
    best_baseline_ms = min(steps, default=float("nan"))
    table = _table(width)
    table.add_column("plan", ratio=5, overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("vs best\nbaseline", justify="right", no_wrap=True)
    table.add_column("outcome", ratio=6, overflow="fold")
    order = list(STYLES)
    for trial in sorted(tried, key=lambda t: (order.index(t.status), _step(t))):
        chosen = trial.status == "verified" and trial.plan == best
        table.add_row(
            Text(trial.plan.title, "bold" if chosen else ""),
            units.milliseconds(_step(trial)) if trial.step_ms else "",
            f"{best_baseline_ms / _step(trial):.2f}x" if trial.step_ms and steps else "",
            _outcome(trial, chosen),
            style="" if trial.status == "verified" else "dim",
        )
    return table


def _step(trial: Trial) -> float:
    return trial.step_ms.p50 if trial.step_ms else float("inf")


def _outcome(trial: Trial, chosen: bool) -> Text:
    words = Text(trial.status, STYLES[trial.status])
    words.append(", baseline" if trial.baseline else "")
    words.append(", chosen" if chosen else "", "bold")
    words.append(f": {_short(trial.reason)}" if trial.reason else "")
    return words


def _skipped(trials: Sequence[Trial]) -> list[Line]:
    """One line per reason; reasons that differ in their figures only are one."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_FIGURE.sub("#", _short(trial.reason)), []).append(trial)
    listed: list[Line] = []
    for alike in list(groups.values())[:_MOST_SKIPPED]:
        names = _names(t.plan.title + (" (baseline)" if t.baseline else "") for t in alike)
        reason = _merged([_short(trial.reason) for trial in alike])
        listed.append(("", Text.assemble(names, (f": {reason}", "dim"))))
    left_out = sum(map(len, list(groups.values())[_MOST_SKIPPED:]))
    if left_out:
        listed.append(("", Text(f"and {left_out} more: --json has them", "dim")))
    return [("skipped", listed[0][1]), *listed[1:]]


def _merged(reasons: Sequence[str]) -> str:
    """`about 3 s needed` and `about 40 s needed` are `about 3 to 40 s needed`."""
    figures = zip(*(_FIGURE.findall(reason) for reason in reasons), strict=True)
    ranges = iter([sorted(set(each), key=float) for each in figures])

    def filled(_: object) -> str:
        found = next(ranges)
        return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"

    return _FIGURE.sub(filled, reasons[0])


def _names(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    rest = len(distinct) - _MOST_NAMES
    shown = ", ".join(distinct[:_MOST_NAMES] if rest > 0 else distinct)
    return f"{shown} and {rest} more" if rest > 0 else shown


def _findings(result: OptimizeResult) -> list[Line]:
    chosen = result.chosen
    best = result.baseline.plan.title
    found: list[Line] = [
        ("plan", Text.assemble((chosen.plan.title, "bold"), f"  ({chosen.plan.key})")),
        *_kept(chosen.plan),
        (
            "step",
            f"{units.milliseconds(chosen.step_ms.p50)}, {units.rate(chosen.samples_per_s)} "
            f"samples/s; {best} {units.milliseconds(result.baseline.step_ms.p50)}",
        ),
        *_gain(result),
    ]
    for other in result.confirmations[1:]:
        over = [f"{ratio(other.speedup_vs_best_baseline)} over {other.best_baseline.title}"]
        versus_eager = other.speedup_vs_eager
        same = _is_eager(other.best_baseline) and versus_eager == other.speedup_vs_best_baseline
        if versus_eager is not None and not same:
            over.insert(0, f"{ratio(versus_eager)} over eager fp32")
        found.append(("", f"at batch {other.batch}: {', '.join(over)}"))
    found += _limit(result.sol)
    found += _values(result.values)
    found += _error(result)
    if result.quality is not None:
        found += _quality(result.quality)
    elif result.untrained:
        found.append(("quality", "not judged: the weights are random"))
    found += [("note", Text(_joined(note), "yellow")) for note in result.notes]
    if result.interrupted:
        found.append(("note", Text("stopped early: this is the best so far", "yellow")))
    return [*found, ("search", _tally(result))]


def _gain(result: OptimizeResult) -> list[Line]:
    """Over eager fp32 and over the best baseline; once where that is the same one."""
    best = result.baseline.plan
    eager = Text.assemble((ratio(result.speedup_vs_eager), "bold"), " over eager fp32")
    if _is_eager(best) and result.speedup_vs_eager == result.speedup_vs_best_baseline:
        return [("speed-up", eager.append(", the best baseline"))]
    over = f"{ratio(result.speedup_vs_best_baseline)} over the best baseline, {best.title}"
    return [("speed-up", eager), ("", over)]


def _is_eager(plan: Plan) -> bool:
    return (plan.backend, plan.precision) == ("eager", "fp32")


def _kept(plan: Plan) -> list[Line]:
    """The operators that a lower precision would break."""
    found: list[Line] = []
    if plan.quantization and plan.quantization.keep:
        found.append(("", f"in {plan.precision}: {_names(plan.quantization.keep)}"))
    if plan.float_operators:
        found.append(("", f"in fp32: {_names(plan.float_operators)}"))
    return found


def _limit(sol: SpeedOfLight | None) -> list[Line]:
    if sol is None or sol.fraction is None:
        return []
    poor = [mark for mark in sol.marks if mark != "measured"]
    source = f", {' and '.join(poor)}" if poor else ""
    return [
        (
            "limit",
            f"{units.milliseconds(sol.ms)}{source} (bound by {sol.bound_by}): "
            f"this is {units.share(sol.fraction)} of the speed of light",
        )
    ]


def _values(values: ValueCheck | None) -> list[Line]:
    if values is None or not values.outputs:
        return []
    worst = max(values.outputs, key=lambda output: output.rms_ratio)
    batches = ", ".join(str(batch) for batch in values.batches)
    size = "" if values.relative_rms is None else f"{values.relative_rms:.2g} of the answer (rms), "
    return [
        (
            "values",
            f"error {size}{worst.rms_ratio:.2f}x eager's own at this precision ({values.k:g}x is "
            f"allowed), checked in a fresh process at batch {batches}",
        )
    ]


def _error(result: OptimizeResult) -> list[Line]:
    """Of a quantised plan, which eager's error does not judge."""
    if result.relative_error is None:
        return []
    what = "relative error of the quantised plan, the largest of any batch size checked"
    return [("values", f"{result.relative_error:.2g}: {what}")]


def _quality(quality: Quality) -> list[Line]:
    words = Text.assemble(
        f"{quality.metric.replace('_', ' ')} {units.percent(quality.reference)} before, ",
        (units.percent(quality.value), "bold"),
        f" after ({quality.n} unseen samples, {quality.harmed} harmed, {quality.helped} helped); "
        f"drop at most {quality.drop_upper95 * 100:.2f} points (95 %), "
        f"{quality.budget * 100:.2f} are allowed",
    )
    found: list[Line] = [("quality", words)]
    return found + [("", Text(f"class {_joined(alarm)}", "red")) for alarm in quality.alarms]


def _tally(result: OptimizeResult | TrainResult) -> str:
    statuses = [trial.status for trial in result.trials]
    counts = [f"{statuses.count(s)} {s}" for s in STYLES if s in statuses]
    resumed = sum(trial.resumed for trial in result.trials)
    earlier = f"; {resumed} from an earlier search" if resumed else ""
    return f"{', '.join(counts)} in {result.seconds_spent:.0f} s{earlier}"


def ratio(estimate: Estimate) -> str:
    """`6.52x (6.41 to 6.60)`."""
    return f"{estimate.p50:.2f}x ({estimate.lo95:.2f} to {estimate.hi95:.2f})"


def _print_usage(out: Console, folder: str) -> None:
    """How to call the engine; lines to copy are never broken."""
    # both kinds of quote, and a backslash, are legal in a path
    quoted = repr(folder) if '"' in folder or "\\" in folder else f'"{folder}"'
    out.print()
    out.print(
        Text.assemble("The engine is in ", (folder, "bold"), ". Call it with"), soft_wrap=True
    )
    out.print()
    out.print("  import suanli")
    out.print(Text(f"  engine = suanli.load({quoted})"), soft_wrap=True)
    out.print("  result = engine(inputs)\n")


# -- suanli doctor --------------------------------------------------------------------------------


def doctor(result: DoctorResult, console: Console | None = None) -> None:
    """Print what `suanli doctor` found: hardware, ceilings, backends, problems."""
    out = console or _console()
    out.print(Text(result.cpu.model, "bold"))
    out.print(_lines(_hardware(result), out.width))
    if result.ceilings:
        _print_ceilings(out, result)
    if result.backends:
        out.print(_backends(result, out.width))
    for problem in result.problems:
        lines: list[Line] = [
            ("problem", Text(problem.what, "yellow")),
            ("mend", Text(problem.mend, "bold")),
        ]
        out.print(_lines(lines, out.width))
    if not result.problems:
        out.print(_lines([("problems", Text("none", "green"))], out.width))


def _hardware(result: DoctorResult) -> list[Line]:
    cpu = result.cpu
    caches = [f"{name} {units.size(n)}" for name, n in cpu.cache_bytes.items()]
    versions = result.environment.libraries
    found: list[Line] = [
        (
            "cores",
            f"{cpu.usable_cores} usable of {cpu.logical_cores} ({cpu.physical_cores} physical), "
            f"{cpu.architecture}",
        ),
        (
            "memory",
            f"{units.size(cpu.memory_bytes)}, {units.size(cpu.memory_available_bytes)} free",
        ),
        ("caches", ", ".join(caches) or "unknown"),
        ("units", ", ".join(cpu.features) or "none that matter here"),
        *(("GPU" if index == 0 else "", _gpu(gpu)) for index, gpu in enumerate(result.gpus)),
        *([] if result.gpus else [("GPU", "none")]),
        ("compiler", result.compiler or "none"),
        (
            "software",
            f"suanli {result.environment.suanli}, Python {result.environment.python}, "
            f"torch {versions.get('torch', 'absent')}, {result.environment.os}",
        ),
    ]
    return found


def _gpu(gpu: GpuInfo) -> str:
    facts = [f"cuda:{gpu.index} {gpu.name}", units.size(gpu.memory_bytes)]
    if gpu.compute_capability:
        facts.append(f"compute capability {gpu.compute_capability}")
    if gpu.multiprocessors:
        facts.append(f"{gpu.multiprocessors} multiprocessors")
    if gpu.clock_mhz:
        facts.append(f"{gpu.clock_mhz} MHz")
    if gpu.power_limit_w:
        facts.append(f"{gpu.power_limit_w:.0f} W")
    if gpu.links:
        facts.append(f"{gpu.links} NVLinks")
    facts.append(f"driver {gpu.driver or 'unknown'}")
    return ", ".join(facts)


def _print_ceilings(out: Console, result: DoctorResult) -> None:
    out.print()
    out.print(Text.assemble(("Ceilings", "bold"), f" of {_device(result.device)}"))
    out.print(_ceilings(result.ceilings, out.width))
    legend: list[Line] = [
        ("hardware", "what the units do at most; achieved: the best of a library"),
        ("spread", "distance of the quartiles over the median of repeated measurements"),
    ]
    if result.measured_at:
        when = result.measured_at.replace("T", " ").replace("+00:00", " UTC")
        legend.append(("measured", f"{when}; `suanli doctor --refresh` measures again"))
    out.print(_lines(legend, out.width, style="dim"))
    if any(item.spread > _BUSY for item in result.ceilings):
        busy = "something else ran meanwhile: figures with a wide spread may be too low"
        out.print(_lines([("note", Text(busy, "yellow"))], out.width))
    out.print()


def _device(device: DeviceInfo) -> str:
    return f"{device.name} ({device.title})"


def _ceilings(ceilings: Sequence[Ceiling], width: int) -> Table:
    sheet = any(item.datasheet for item in ceilings)
    table = _table(width)
    table.add_column("what", overflow="fold", ratio=1)
    for heading in ("hardware", "achieved", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("mark", no_wrap=True)
    if sheet:
        table.add_column("of data-\nsheet", justify="right", no_wrap=True)
    for index, item in enumerate(ceilings):
        last = index + 1 == len(ceilings) or ceilings[index + 1].what != item.what
        known = item.best
        of_sheet = units.share(known / item.datasheet) if item.datasheet and known else ""
        table.add_row(
            _what(item),
            _rate(item.hardware, item),
            _rate(item.achieved, item),
            f"{item.spread * 100:.0f} %",
            Text(item.mark, "" if item.mark == "measured" else "yellow"),
            *([of_sheet] if sheet else []),
            end_section=last and item.what in ("matmul", "read", "copy"),
        )
    return table


def _what(item: Ceiling) -> str:
    names = {"host_to_device": "host to device", "device_to_host": "device to host"}
    parts = [names.get(item.what, item.what.replace("_", " ")), item.dtype]
    if item.working_set_bytes and item.what in ("read", "copy"):
        parts.append(units.size(item.working_set_bytes))
    return " ".join(part for part in parts if part)


def _rate(value: float | None, item: Ceiling) -> str:
    if value is None:
        return ""
    if item.unit == "s":
        return units.milliseconds(value * 1e3)
    unit = "OP/s" if item.dtype == "int8" and item.unit == "FLOP/s" else item.unit
    return units.si(value, unit)


def _backends(result: DoctorResult, width: int) -> Table:
    table = _table(width)
    table.add_column("backend", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    for backend in result.backends:
        if backend.present:
            table.add_row(Text(backend.name), Text(backend.version or "present"), "")
            continue
        why = Text(f"{backend.reason}: " if backend.reason else "", "dim")
        table.add_row(
            Text(backend.name), Text("absent", "yellow"), why.append(backend.install, "bold")
        )
    return table


# -- the other verbs ------------------------------------------------------------------------------


def run(result: RunResult, console: Console | None = None) -> None:
    """Print what `suanli run` computed."""
    out = console or _console()
    for name, shape, dtype in zip(
        result.output_names, result.output_shapes, result.output_dtypes, strict=True
    ):
        out.print(Text(f"{name}: {list(shape)} {dtype}"))
    who = "the portable plan" if result.portable else result.plan.title
    out.print(Text(f"{units.milliseconds(result.call_ms)} in one call of {who}"))
    differs: list[Line] = [("differs", Text(line, "yellow")) for line in result.differences]
    if differs:
        out.print(_lines(differs, out.width))
    if result.output:
        out.print(Text(f"wrote {result.output}"), soft_wrap=True)


def export(result: ExportResult, console: Console | None = None) -> None:
    """Print what `suanli export` wrote."""
    (console or _console()).print(Text(f"wrote {result.output}"), soft_wrap=True)


def trust(result: TrustResult, console: Console | None = None) -> None:
    """Print whose engines open here."""
    out = console or _console()
    shown: list[Line] = [
        ("your key", Text(result.own.fingerprint, "bold")),
        ("", Text(f"public: {result.own.public_key}", "dim")),
    ]
    names = [Text(key.fingerprint) for key in result.trusted] or [Text("nobody else", "dim")]
    shown += [("trusted" if not i else "", name) for i, name in enumerate(names)]
    if result.added:
        shown.append(("added", f"{result.added}: ask its owner whether that is the fingerprint"))
    if result.removed:
        shown.append(("removed", result.removed))
    out.print(_lines(shown, out.width))


def workloads(result: WorkloadsResult, console: Console | None = None) -> None:
    """Print the list of built-in workloads."""
    out = console or _console()
    table = _table(out.width)
    table.add_column("workload", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    for entry in result.workloads:
        table.add_row(Text(entry.name), Text(entry.note))
    out.print(table)
    legend: list[Line] = [
        ("untrained", "random weights: speed and rounding are real, answers mean nothing;"),
        ("", "--weights FILE gives it real ones"),
        ("data", "SUANLI_DATA=DIR stands in for --data DIR"),
    ]
    out.print(_lines(legend, out.width, style="dim"))


# -- layout ---------------------------------------------------------------------------------------


def _joined(text: str) -> str:
    """One line, whatever stood in it."""
    return " ".join(text.split())


def _short(reason: str) -> str:
    line = _joined(reason)
    return line if len(line) <= _MOST_REASON else f"{line[:_MOST_REASON].rstrip()} ..."
