"""What a page shows of `suanli profile`."""

from dataclasses import replace

from suanli.base import units
from suanli.base.profile_results import OperatorProfile, ProfileResult, SlowStep
from suanli.reports.html.drawing import Legend
from suanli.reports.html.markup import Element, el
from suanli.reports.html.pictures.bars import Bar, Part, stack, waterfall
from suanli.reports.html.pictures.bounds import CLASS
from suanli.reports.html.pictures.roofline import Point, roofline
from suanli.reports.html.pictures.timeline import timeline
from suanli.reports.html.section import Section, Tile, busy, card, limit_tile, setting
from suanli.reports.html.tables import Column, Figure, Row, facts, table
from suanli.reports.html.verbs import machine, tracks
from suanli.reports.html.verbs.advice import advice

_PHASES = {
    "forward_ms": ("forward", "c0"),
    "backward_ms": ("backward", "c3"),
    "optimizer_ms": ("optimiser", "c1"),
    "data_ms": ("waiting for data", "c4"),
    "transfer_ms": ("transfer", "c6"),
    "communication_ms": ("communication", "c7"),
    "idle_ms": ("idle between operators", "idle"),
}


def section(result: ProfileResult) -> Section:
    """The verdict, what to change, and where the time goes."""
    what = "training step" if result.training else "inference step"
    return Section(
        verb="profile",
        title=result.workload,
        about=f"{what}, batch {result.batch}, {result.plan.title}, on {result.device.title}",
        verdict=_sentence(result.verdict),
        tiles=[tile for tile in _tiles(result) if tile],
        notes=[*result.notes, *_stopped(result), *busy(result.environment, result.notes)],
        parts=[
            advice(result.advice),
            _waterfall(result),
            _phases(result),
            _roofline(result),
            _timeline(result),
            _operators(result),
            _memory(result),
            _stability(result),
            machine.ceilings(result.ceilings),
            setting(result.environment, result.device),
        ],
    )


def shortened(result: ProfileResult, most: int) -> ProfileResult:
    """The result with its largest operators and longest events, and a note that says so.

    Args:
        result: Operators by time, the longest first.
        most: How many operators stay, and four times as many events.
    """
    left_out = result.operators[most:]
    events = sorted(result.trace, key=lambda e: -e.duration_ms)[: 4 * most]
    said = []
    if left_out:
        share = units.share(sum(o.share for o in left_out))
        said.append(
            f"The {len(left_out):,} smallest of {len(result.operators):,} operators, {share} of "
            "the step, are left out to keep the page small; the result as JSON has them all."
        )
    if len(events) < len(result.trace):
        said.append(f"The timeline has the {len(events):,} longest of its events.")
    return replace(
        result,
        operators=result.operators[:most],
        trace=tuple(sorted(events, key=lambda e: e.start_ms)),
        notes=(*result.notes, *said),
    )


def _sentence(words: str) -> str:
    said = words[:1].upper() + words[1:]
    return said if not said or said.endswith((".", "!", "?")) else f"{said}."


def _tiles(result: ProfileResult) -> list[Tile | None]:
    step, top = result.step_ms, result.advice[0] if result.advice else None
    energy = result.energy_j
    return [
        Tile(
            name="per step",
            figure=units.milliseconds(step.p50),
            small=f"{units.rate(result.samples_per_s)} samples/s; 95 %: "
            f"{units.milliseconds(step.lo95)} to {units.milliseconds(step.hi95)}",
        ),
        limit_tile(result.sol),
        Tile(
            name="most of it is bound by",
            figure=result.bound_by,
            small=f"{units.si(result.flops, 'FLOP')} per step, {result.parameters:,} parameters",
        ),
        Tile(
            name="the first change is worth",
            figure=f"{top.expected_speedup:.2f}×",
            small=f"expected of: {top.change}",
        )
        if top
        else None,
        Tile(
            name="energy per step",
            figure="unknown" if energy is None else f"{energy:.3g} J",
            small="no counter can be read here" if energy is None else "",
        ),
    ]


def _stopped(result: ProfileResult) -> list[str]:
    return ["Stopped before all advice was tried."] if result.interrupted else []


def _waterfall(result: ProfileResult) -> Element | None:
    """From the measured step down to the limit, by cause."""
    if result.sol is None or not result.lost:
        return None
    whole, limit = result.step_ms.p50, result.sol.ms

    def share(ms: float) -> str:
        return f"{units.share(ms / whole)} of the step"

    losses = [
        Bar(name=cause.cause, end=cause.ms, kind=CLASS[cause.bound_by],
            tip=(share(cause.ms), f"bound by {cause.bound_by}"))
        for cause in result.lost
        if cause.ms > 0
    ]  # fmt: skip
    rows: list[Row] = [
        [row.cause, row.bound_by, Figure.of(row.ms, units.milliseconds(row.ms)),
         Figure.of(row.ms / whole, units.share(row.ms / whole))]
        for row in result.lost
    ]  # fmt: skip
    shown = Figure.of(limit, units.milliseconds(limit))
    part = Figure.of(limit / whole, units.share(limit / whole))
    rows.append(["speed of light", result.sol.bound_by, shown, part])
    columns = [
        Column(name="cause", wide=True),
        Column(name="bound by"),
        Column(name="time", number=True),
        Column(name="of the step", number=True),
    ]
    return waterfall(
        "From the measured step down to the limit",
        "Each bar is time that its cause takes beyond what the machine needs at least.",
        whole=Bar(name="measured step", end=whole, kind="plain", strong=True),
        losses=losses,
        limit=Bar(name="speed of light", end=limit, kind="limit", strong=True, tip=(share(limit),)),
        show=units.milliseconds,
        table=table("Lost time by cause", columns, rows),
    )


def _phases(result: ProfileResult) -> Element:
    values = [
        (name, kind, getattr(result.categories, key)) for key, (name, kind) in _PHASES.items()
    ]
    total = result.categories.total_ms or 1.0
    columns = [
        Column(name="part"),
        Column(name="time", number=True),
        Column(name="share", number=True),
    ]
    rows: list[Row] = [
        [name, Figure.of(ms, units.milliseconds(ms)), Figure.of(ms, units.share(ms / total))]
        for name, _, ms in values
    ]
    return stack(
        "The parts of a step",
        f"They add up to {units.milliseconds(total)}; the undisturbed step takes "
        f"{units.milliseconds(result.step_ms.p50)}.",
        [Part(name=name, value=ms, kind=kind) for name, kind, ms in values],
        units.milliseconds,
        table("Parts of a step", columns, rows),
    )


def _roofline(result: ProfileResult) -> Element | None:
    points = [
        Point(name=_place(o), flops=o.flops, bytes=o.bytes, time_ms=o.time_ms, share=o.share,
              bound_by=o.bound_by)
        for o in result.operators
    ]  # fmt: skip
    without = sum(o.share for o in result.operators if not (o.flops and o.bytes))
    about = (
        "Every operator of the step: the larger, the more time it takes. The distance up to the "
        "line of its element type is what it could gain."
    )
    if without >= 0.005:
        about += f" Operators that do no arithmetic ({units.share(without)}) have no place here."
    columns = [
        Column(name="operator", wide=True, code=True),
        Column(name="type"),
        Column(name="time", number=True),
        Column(name="FLOP/byte", number=True),
        Column(name="FLOP/s", number=True),
        Column(name="bytes/s", number=True),
        Column(name="bound by"),
    ]
    rows: list[Row] = [
        [
            _place(o),
            o.dtype,
            Figure.of(o.time_ms, units.milliseconds(o.time_ms)),
            Figure.of(o.intensity, f"{o.intensity or 0:.3g}"),
            Figure.of(o.flops_per_s, units.si(o.flops_per_s or 0.0, "FLOP/s")),
            Figure.of(o.bytes_per_s, units.si(o.bytes_per_s or 0.0, "B/s")),
            o.bound_by,
        ]
        for o in result.operators
        if o.flops and o.bytes
    ]
    return roofline(points, result.ceilings, about, table("Operators", columns, rows))


def _place(operator: OperatorProfile) -> str:
    return f"{operator.name} {operator.module}".strip()


def _timeline(result: ProfileResult) -> Element | None:
    entries = [
        Legend(mark=f"{kind} square", name=name)
        for name, kind in tracks.legend(result.trace, result.operators)
    ]
    return timeline(
        "Timeline of one step",
        "One recorded step, which recording makes a little longer. Zoom in for short operators.",
        tracks.lanes(result.trace, result.operators),
        tracks.event_table(result.trace, result.operators),
        entries,
    )


def _operators(result: ProfileResult) -> Element:
    columns = [
        Column(name="operator", code=True),
        Column(name="module", code=True),
        Column(name="source", code=True),
        Column(name="calls", number=True),
        Column(name="time", number=True, about="of all calls in a step"),
        Column(name="share", number=True, about="of the step"),
        Column(name="lost", number=True, about="beyond its own speed of light"),
        Column(name="limit", number=True, about="its own speed of light"),
        Column(name="bound by"),
        Column(name="pass"),
        Column(name="FLOPs", number=True),
        Column(name="bytes", number=True),
    ]
    rows: list[Row] = [_operator(o) for o in result.operators]
    about = "By time. Names of the model's own modules and lines stand beside what they call."
    if result.untraced_ms > 0:
        about += f" {units.milliseconds(result.untraced_ms)} could not be matched to an operator."
    return card("Operators", about, table("All operators of a step", columns, rows))


def _operator(o: OperatorProfile) -> Row:
    fused = f" + {len(o.fused) - 1} fused" if len(o.fused) > 1 else ""
    return [
        f"{o.name}{fused}",
        o.module,
        o.source,
        Figure.of(o.count, str(o.count)),
        Figure.of(o.time_ms, units.milliseconds(o.time_ms)),
        Figure.of(o.share, units.share(o.share)),
        Figure.of(o.lost_ms, units.milliseconds(o.lost_ms or 0.0)),
        Figure.of(o.sol_ms, units.milliseconds(o.sol_ms or 0.0)),
        el("span", o.bound_by, class_=CLASS[o.bound_by]),
        o.phase.replace("optimizer", "optimiser"),
        Figure.of(o.flops or None, units.si(o.flops, "")),
        Figure.of(o.bytes or None, units.size(o.bytes)),
    ]


def _memory(result: ProfileResult) -> Element | None:
    memory = result.memory
    if memory is None:
        return None
    columns = [
        Column(name="kind"),
        Column(name="measured", number=True),
        Column(name="predicted", number=True),
    ]
    rows: list[Row] = []
    for key, (name, _) in {**machine.MEMORY, "total_bytes": ("total", "")}.items():
        seen = getattr(memory, key)
        guess = getattr(memory.predicted, key) if memory.predicted else None
        rows.append(
            [name, Figure.of(seen, units.size(seen)), Figure.of(guess, units.size(guess or 0))]
        )
    about = "What is held at the fullest moment of the step."
    if memory.process_bytes:
        about += f" The whole process, libraries included: {units.size(memory.process_bytes)}."
    return stack(
        "Memory by kind",
        about,
        [
            Part(name=n, value=getattr(memory, key), kind=kind)
            for key, (n, kind) in machine.MEMORY.items()
        ],
        units.size,
        table("Memory by kind", columns, rows),
    )


def _stability(result: ProfileResult) -> Element:
    steady, cost = result.stability, result.profiler
    entries = [
        ("steps timed one by one", str(steady.steps)),
        ("spread (quartiles over median)", units.share(steady.spread)),
        ("slowest step", units.milliseconds(steady.slowest_ms)),
        ("slow steps", _slow(steady.outliers)),
        ("cost of recording", "" if cost is None else f"{units.share(cost.cost)} of a step"),
    ]
    return card("How steady it is", "", facts(entries))


def _slow(outliers: tuple[SlowStep, ...]) -> str:
    if not outliers:
        return "none"
    said = [
        f"step {o.step}: {units.milliseconds(o.ms)}{f' ({o.cause})' if o.cause else ''}"
        for o in outliers[:4]
    ]
    rest = len(outliers) - len(said)
    return "; ".join(said) + (f"; and {rest} more" if rest else "")
