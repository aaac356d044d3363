"""What a page shows of `suanli predict`, for one card and for all of them."""

from suanli.base import units
from suanli.base.memory import MemoryUse
from suanli.base.predict_results import ChooseResult, Prediction, PredictResult, Ranked
from suanli.base.prediction import Interval
from suanli.base.timing import Estimate
from suanli.reports.html.drawing import Legend
from suanli.reports.html.markup import Element
from suanli.reports.html.pictures.bars import Part, stack
from suanli.reports.html.pictures.scatter import Axis, Spot, scatter
from suanli.reports.html.scales import log_around
from suanli.reports.html.section import Section, Tile, card, setting
from suanli.reports.html.tables import Column, Figure, Row, facts, table
from suanli.reports.html.verbs import machine

_TIMES = {
    "compute_ms": ("compute", "compute"),
    "memory_ms": ("memory", "memory"),
    "overhead_ms": ("overhead", "overhead"),
    "communication_ms": ("communication", "communication"),
}
_MEMORY = {
    **machine.MEMORY,
    "kv_cache_bytes": ("KV cache", "c4"),
    "fragmentation_bytes": ("fragmentation", "c6"),
    "context_bytes": ("driver and libraries", "c7"),
}


def section(result: PredictResult) -> Section:
    """One card: time with its interval, memory, energy, cost."""
    return Section(
        verb="predict",
        title=f"{result.workload} on {_cards(result)}",
        about=f"{result.mode}, batch {result.batch}, {result.plan.title}; predicted, not measured",
        verdict=f"A step takes about {units.milliseconds(result.step_ms.p50)}, and "
        f"{'fits' if result.fits else 'does not fit'} the card's memory.",
        tiles=[tile for tile in _tiles(result) if tile],
        notes=[*result.notes, *result.widened],
        parts=[
            _times(result),
            _memory(result.memory, result.usable_bytes),
            _layout(result),
            setting(result.environment, result.device),
        ],
    )


def ranking(result: ChooseResult) -> Section:
    """All cards for a job: time against money, or against energy where there are no prices."""
    first = result.ranked[0] if result.ranked else None
    verdict = "No card is left." if first is None else _best(first)
    return Section(
        verb="predict --choose",
        title=f"{result.workload}: which card",
        about=f"{result.mode}, batch {result.batch}, {result.n_devices} "
        f"{'card' if result.n_devices == 1 else 'cards'}, {result.samples:,} samples; predicted",
        verdict=verdict,
        tiles=[],
        notes=result.notes,
        parts=[
            _picture(result),
            card("Ranking", "", _ranking_table(result)),
            _excluded(result),
            setting(result.environment, result.device),
        ],
    )


def _cards(result: Prediction) -> str:
    return f"{result.n_devices} × {result.gpu}" if result.n_devices > 1 else result.gpu


def _between(step: Interval) -> str:
    return f"90 %: {units.milliseconds(step.lo90)} to {units.milliseconds(step.hi90)}"


def _tiles(result: PredictResult) -> list[Tile | None]:
    return [
        Tile(
            name="per step",
            figure=units.milliseconds(result.step_ms.p50),
            small=_between(result.step_ms),
        ),
        Tile(name="samples per second", figure=units.rate(result.samples_per_s)),
        Tile(
            name="memory",
            figure=units.size(result.memory.total_bytes),
            small=f"of {units.size(result.usable_bytes)} on each card",
        ),
        Tile(
            name="of the speed of light",
            figure=units.share(result.sol.fraction),
            small=f"bound by {result.bound_by}",
        ),
        Tile(
            name="energy per step",
            figure=f"{result.energy_j:.3g} J",
            small=f"{result.power_w:.0f} W" if result.power_w else "",
        )
        if result.energy_j is not None
        else None,
        Tile(
            name=f"{result.cost.currency} per million samples",
            figure=f"{result.cost.per_million_samples:.3g}",
        )
        if result.cost
        else None,
    ]


def _times(result: PredictResult) -> Element:
    parts = [(name, kind, getattr(result, key)) for key, (name, kind) in _TIMES.items()]
    columns = [Column(name="part"), Column(name="time", number=True)]
    rows: list[Row] = [[name, Figure.of(ms, units.milliseconds(ms))] for name, _, ms in parts]
    return stack(
        "The predicted step",
        f"By what binds each operator. {_between(result.step_ms)}.",
        [Part(name=name, value=ms, kind=kind) for name, kind, ms in parts],
        units.milliseconds,
        table("Parts of the predicted step", columns, rows),
    )


def _memory(memory: MemoryUse, usable: int) -> Element:
    parts = [(name, kind, getattr(memory, key)) for key, (name, kind) in _MEMORY.items()]
    columns = [Column(name="kind"), Column(name="bytes", number=True)]
    rows: list[Row] = [[name, Figure.of(n, units.size(n))] for name, _, n in parts]
    rows.append(["total", Figure.of(memory.total_bytes, units.size(memory.total_bytes))])
    return stack(
        "Memory by kind",
        "Of one card, at the fullest moment of the step.",
        [Part(name=name, value=n, kind=kind) for name, kind, n in parts],
        units.size,
        table("Memory by kind", columns, rows),
        room=float(usable),
        room_name="usable",
    )


def _layout(result: PredictResult) -> Element:
    layout = result.layout
    return card(
        "How it is laid out, and what the figures rest on",
        "",
        facts(
            [
                ("data parallel", str(layout.dp)),
                ("tensor parallel", str(layout.tp)),
                ("pipeline stages", str(layout.pp)),
                ("micro-batches", str(layout.micro_batches)),
                ("sharded", "yes" if layout.sharded else "no"),
                ("recomputation", "yes" if layout.recompute else "no"),
                ("operations of a step", units.si(result.flops, "FLOP")),
                ("parameters", f"{result.parameters:,}"),
                ("sources", "; ".join(result.sources)),
            ]
        ),
    )


def _best(first: Ranked) -> str:
    words = f"{first.gpu} comes first: {units.milliseconds(first.step_ms.p50)} a step"
    cost = f", {first.job_cost:.3g} for the job" if first.job_cost is not None else ""
    return f"{words}{cost}, {first.job_s / 3600:.3g} hours."


def _picture(result: ChooseResult) -> Element | None:
    """Hours against money, or against energy where no card has a price."""
    priced = any(entry.job_cost is not None for entry in result.ranked)
    known = [(e, v) for e in result.ranked if (v := _spent(e, priced)) is not None]
    if len(known) < 2:
        return None
    by = "cost of the job" if priced else "energy of the job (kWh)"
    spots = [
        Spot(
            name=entry.gpu,
            x=entry.job_s / 3600,
            y=spent,
            kind="chosen" if entry.pareto else "skipped",
            named=entry.pareto,
            interval=_job_interval(entry),
            tip=(f"{entry.job_s / 3600:.3g} h, {by} {spent:.3g}", _between(entry.step_ms)),
        )
        for entry, spent in known
    ]
    hours = [s.x for s in spots]
    return scatter(
        f"Time against {'money' if priced else 'energy'}",
        "Left is faster, down is cheaper. Coloured cards are those that no other beats in time, "
        "money and energy together; whiskers are 90 % intervals.",
        spots,
        x=Axis(scale=log_around(hours, 4), title="hours for the job", show=_plain),
        y=Axis(scale=log_around([s.y for s in spots], 4), title=by, show=_plain),
        legend=[
            Legend(mark="chosen circle", name="not beaten"),
            Legend(mark="skipped circle", name="beaten"),
        ],
        table=_ranking_table(result),
    )


def _spent(entry: Ranked, priced: bool) -> float | None:
    if priced:
        return entry.job_cost
    return None if entry.job_energy_j is None else entry.job_energy_j / 3.6e6


def _job_interval(entry: Ranked) -> Estimate:
    step, hours = entry.step_ms, entry.job_s / 3600
    return Estimate(p50=hours, lo95=hours * step.lo90 / step.p50, hi95=hours * step.hi90 / step.p50)


def _plain(value: float) -> str:
    return f"{value:.3g}" if value < 1e4 else units.si(value, "").strip()


def _ranking_table(result: ChooseResult) -> Element:
    columns = [
        Column(name="rank", number=True),
        Column(name="card"),
        Column(name="step", number=True),
        Column(name="90 % interval"),
        Column(name="samples/s", number=True),
        Column(name="hours", number=True),
        Column(name="cost", number=True),
        Column(name="kWh", number=True),
        Column(name="memory", number=True, about="of what a process can get"),
        Column(name="beaten"),
    ]
    rows: list[Row] = [
        _ranked(number, entry) for number, entry in enumerate(result.ranked, start=1)
    ]
    return table("Cards, the best first", columns, rows)


def _ranked(number: int, entry: Ranked) -> Row:
    step, energy = entry.step_ms, entry.job_energy_j
    part = entry.memory.total_bytes / entry.usable_bytes
    return [
        Figure.of(number, str(number)),
        entry.gpu,
        Figure.of(step.p50, units.milliseconds(step.p50)),
        f"{units.milliseconds(step.lo90)} to {units.milliseconds(step.hi90)}",
        Figure.of(entry.samples_per_s, units.rate(entry.samples_per_s)),
        Figure.of(entry.job_s, f"{entry.job_s / 3600:.3g}"),
        Figure.of(entry.job_cost, f"{entry.job_cost or 0:.3g}"),
        Figure.of(energy, f"{(energy or 0) / 3.6e6:.3g}"),
        Figure.of(part, units.share(part)),
        "no" if entry.pareto else "yes",
    ]


def _excluded(result: ChooseResult) -> Element | None:
    if not result.excluded:
        return None
    rows: list[Row] = [[entry.gpu, entry.reason] for entry in result.excluded]
    columns = [Column(name="card"), Column(name="reason", wide=True)]
    return card("Left out", "", table("Cards that are out", columns, rows))
