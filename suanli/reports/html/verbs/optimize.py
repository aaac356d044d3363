"""What a page shows of `suanli optimize`."""

from suanli.base import units
from suanli.base.plan import Plan
from suanli.base.results import Confirmation, OptimizeResult
from suanli.base.timing import Estimate
from suanli.base.trial import Quality, ValueCheck
from suanli.reports.html.markup import Element
from suanli.reports.html.pictures.bars import Bar, bars
from suanli.reports.html.section import (
    Section,
    Tile,
    busy,
    card,
    interval,
    limit_tile,
    ratio,
    setting,
)
from suanli.reports.html.tables import Column, Figure, Row, facts, table
from suanli.reports.html.verbs import machine, trials


def section(result: OptimizeResult) -> Section:
    """The answer, its race against the baselines, its proof, and how it was found."""
    return Section(
        verb="optimize",
        title=result.workload,
        about=f"{result.objective}, batch {result.batch}, on {result.device.title}",
        verdict=_verdict(result),
        tiles=[tile for tile in _tiles(result) if tile],
        notes=[*result.notes, *_stopped(result), *busy(result.environment, result.notes)],
        parts=[
            _ladder(result),
            _batches(result),
            _proof(result),
            *trials.parts(result.trials, result.chosen.plan),
            _classes(result.quality),
            _plan(result),
            machine.ceilings(result.ceilings),
            setting(result.environment, result.device),
        ],
    )


def _verdict(result: OptimizeResult) -> str:
    chosen, best = result.chosen, result.baseline.plan.title
    if chosen.plan == result.baseline.plan:
        return f"Nothing tried beats {best}, which stays the best plan."
    words = (
        f"{chosen.plan.title} takes {units.milliseconds(chosen.step_ms.p50)} for a step: "
        f"{ratio(result.speedup_vs_best_baseline)} faster than {best}, the best that PyTorch does "
        "by itself"
    )
    if result.quality is not None:
        metric = result.quality.metric.replace("_", " ")
        return f"{words}, with {metric} at {units.percent(result.quality.value)}."
    if result.values is not None and result.values.ok:
        return f"{words}, and its values hold against float64."
    return f"{words}."


def _tiles(result: OptimizeResult) -> list[Tile | None]:
    quality = result.quality
    return [
        Tile(
            name="per step",
            figure=units.milliseconds(result.chosen.step_ms.p50),
            small=f"{units.rate(result.chosen.samples_per_s)} samples/s",
        ),
        Tile(
            name="over eager fp32",
            figure=ratio(result.speedup_vs_eager),
            small=f"{interval(result.speedup_vs_eager)} (95 %)",
        ),
        Tile(
            name="over the best baseline",
            figure=ratio(result.speedup_vs_best_baseline),
            small=f"{interval(result.speedup_vs_best_baseline)} (95 %), "
            f"{result.baseline.plan.title}",
        ),
        limit_tile(result.sol),
        Tile(
            name=quality.metric.replace("_", " "),
            figure=units.percent(quality.value),
            small=f"{units.percent(quality.reference)} before; drop at most "
            f"{100 * quality.drop_upper95:.2f} points (95 %)",
        )
        if quality
        else None,
    ]


def _stopped(result: OptimizeResult) -> list[str]:
    found = list(result.quality.alarms) if result.quality else []
    if result.untrained and result.quality is None:
        found.append("Quality was not judged: the weights are random.")
    if result.interrupted:
        found.append("The search was stopped early: this is the best so far.")
    return found


def _ladder(result: OptimizeResult) -> Element:
    """From what there was before down to the limit."""
    chosen, eager = result.chosen.step_ms, result.speedup_vs_eager
    before = Estimate(
        p50=chosen.p50 * eager.p50, lo95=chosen.p50 * eager.lo95, hi95=chosen.p50 * eager.hi95
    )
    best = result.baseline
    rows = [("eager fp32", before, "plain", "the race's speed-up times the chosen plan's step")]
    if not _is_eager(best.plan):
        rows.append((f"best baseline: {best.plan.title}", best.step_ms, "c5", "raced"))
    if result.chosen.plan != best.plan:
        rows.append((f"chosen: {result.chosen.plan.title}", chosen, "chosen", "raced"))
    drawn = [
        Bar(name=name, end=step.p50, kind=kind, interval=step, strong=kind == "chosen",
            tip=(f"95 %: {units.milliseconds(step.lo95)} to {units.milliseconds(step.hi95)}",))
        for name, step, kind, _ in rows
    ]  # fmt: skip
    cells: list[Row] = [
        [
            name,
            Figure.of(step.p50, units.milliseconds(step.p50)),
            f"{units.milliseconds(step.lo95)} to {units.milliseconds(step.hi95)}",
            source,
        ]
        for name, step, _, source in rows
    ]
    if result.sol is not None:
        sol = result.sol
        drawn.append(Bar(name="speed of light", end=sol.ms, kind="limit",
                         tip=(f"bound by {sol.bound_by}",)))  # fmt: skip
        shown = Figure.of(sol.ms, units.milliseconds(sol.ms))
        cells.append(["speed of light", shown, "", f"bound by {sol.bound_by}"])
    columns = [
        Column(name="what", wide=True),
        Column(name="step", number=True),
        Column(name="95 % interval"),
        Column(name="source"),
    ]
    return bars(
        "Time of a step, from before down to the limit",
        "Timed in a race of its own after the search, so that luck in the search does not count; "
        "whiskers are 95 % intervals.",
        drawn,
        units.milliseconds,
        table("Time of a step", columns, cells),
    )


def _is_eager(plan: Plan) -> bool:
    return plan.backend == "eager" and plan.precision == "fp32"


def _batches(result: OptimizeResult) -> Element | None:
    """The races at the other batch sizes."""
    if not result.confirmations:
        return None
    columns = [
        Column(name="batch", number=True),
        Column(name="step", number=True),
        Column(name="samples/s", number=True),
        Column(name="over eager fp32", number=True),
        Column(name="over the best baseline", number=True),
        Column(name="that baseline's step", number=True),
        Column(name="that baseline", code=True),
        Column(name="note", wide=True),
    ]
    rows: list[Row] = [_race(race) for race in result.confirmations]
    return card(
        "Confirmed at each batch size",
        "Fresh timings in alternation with the best baseline.",
        table("Races by batch size", columns, rows),
    )


def _race(race: Confirmation) -> Row:
    def over(estimate: Estimate | None) -> Figure:
        if estimate is None:
            return Figure.of(None, "")
        return Figure.of(estimate.p50, f"{ratio(estimate)} ({interval(estimate)})")

    theirs = race.baseline_ms.p50 if race.baseline_ms is not None else None
    return [
        Figure.of(race.batch, str(race.batch)),
        Figure.of(race.step_ms.p50, units.milliseconds(race.step_ms.p50)),
        Figure.of(race.samples_per_s, units.rate(race.samples_per_s)),
        over(race.speedup_vs_eager),
        over(race.speedup_vs_best_baseline),
        Figure.of(theirs, units.milliseconds(theirs or 0.0)),
        race.best_baseline.title,
        race.note,
    ]


def _proof(result: OptimizeResult) -> Element | None:
    entries = [*_of_quality(result.quality), *_of_values(result.values)]
    if result.relative_error is not None:
        entries.append(("relative error of the quantised plan", f"{result.relative_error:.2g}"))
    if not entries:
        return None
    return card("The proof that it answers the same", "", facts(entries))


def _of_quality(quality: Quality | None) -> list[tuple[str, str]]:
    if quality is None:
        return []
    name = quality.metric.replace("_", " ")
    return [
        (f"{name} before", units.percent(quality.reference)),
        (f"{name} after", units.percent(quality.value)),
        ("unseen samples", f"{quality.n:,}"),
        ("right before, wrong after", str(quality.harmed)),
        ("wrong before, right after", str(quality.helped)),
        ("drop at most (95 %)", f"{100 * quality.drop_upper95:.2f} points"),
        ("drop allowed", f"{100 * quality.budget:.2f} points"),
    ]


def _of_values(values: ValueCheck | None) -> list[tuple[str, str]]:
    if values is None or not values.outputs:
        return []
    worst = max(values.outputs, key=lambda output: output.rms_ratio)
    found = [
        ("error over eager's own at this precision", f"{worst.rms_ratio:.2f}×"),
        ("allowed", f"{values.k:g}×"),
        ("checked in a fresh process at batch", ", ".join(map(str, values.batches))),
    ]
    if values.relative_rms is not None:
        found.append(("error over the answer (rms)", f"{values.relative_rms:.2g}"))
    return found


def _classes(quality: Quality | None) -> Element | None:
    if quality is None or not quality.per_class:
        return None
    columns = [
        Column(name="class"),
        Column(name="samples", number=True),
        Column(name="recall before", number=True),
        Column(name="recall after", number=True),
        Column(name="drop", number=True, about="percentage points"),
    ]
    rows: list[Row] = [
        [
            entry.label,
            Figure.of(entry.n, str(entry.n)),
            Figure.of(entry.reference, units.percent(entry.reference)),
            Figure.of(entry.recall, units.percent(entry.recall)),
            Figure.of(entry.drop, f"{100 * entry.drop:.2f}"),
        ]
        for entry in quality.per_class
    ]
    about = "No class may pay for the speed of the others."
    return card("Quality by class", about, table("Recall by class", columns, rows))


def _plan(result: OptimizeResult) -> Element:
    plan = result.chosen.plan
    kept = plan.quantization.keep if plan.quantization else ()
    return card(
        "The plan",
        "",
        facts(
            [
                ("name", f"{plan.title} ({plan.key})"),
                ("backend", plan.backend),
                ("precision", plan.precision),
                ("quantisation", plan.quantization.scheme if plan.quantization else ""),
                ("kept in floating point", ", ".join(kept)),
                ("kept in fp32", ", ".join(plan.float_operators)),
                ("memory layout", plan.memory_layout),
                ("streams and threads", f"{plan.streams} × {plan.threads or 'all'}"),
                ("operations of a step", units.si(result.flops, "FLOP")),
                ("parameters", f"{result.parameters:,}"),
                ("engine", result.engine_dir or ""),
                ("search took", f"{result.seconds_spent:.0f} s" if result.seconds_spent else ""),
                *((name, str(value)) for name, value in sorted(plan.options.items())),
            ]
        ),
    )
