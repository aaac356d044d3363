"""What a page shows of `suanli train`."""

from collections.abc import Sequence

from suanli.base import units
from suanli.base.train_results import TrainProgress, TrainQuality, TrainResult
from suanli.reports.html.markup import Element
from suanli.reports.html.pictures.curves import Curve, Moment, curves
from suanli.reports.html.scales import Linear, linear_around, linear_to, log_around
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

_STOPPED = {
    "epochs": "all epochs are done",
    "steps": "the steps asked for are done",
    "target": "the target was reached",
    "time": "the time was over",
    "asked": "it was stopped early",
}


def section(result: TrainResult, history: Sequence[TrainProgress]) -> Section:
    """The quality that was reached, the course of the run, and how its plan was found."""
    plan = result.plan.as_plan()
    return Section(
        verb="train",
        title=result.workload,
        about=f"batch {result.batch}, seed {result.seed}, {plan.title}, on {result.device.title}",
        verdict=_verdict(result),
        tiles=[tile for tile in _tiles(result) if tile],
        notes=[*result.notes, *_changed(result), *busy(result.environment, result.notes)],
        parts=[
            *course(history, result.quality),
            *trials.parts(result.trials, plan),
            _run(result),
            _hyper_parameters(result),
            machine.ceilings(result.ceilings),
            setting(result.environment, result.device),
        ],
    )


def course(history: Sequence[TrainProgress], quality: TrainQuality | None) -> list[Element | None]:
    """Loss, quality and rate over the time of training."""
    if len(history) < 2:
        return []
    listed = _history_table(history)
    return [
        _loss(history, listed),
        _quality(history, quality, listed),
        _rate(history, listed),
    ]


def _verdict(result: TrainResult) -> str:
    quality, words = result.quality, ""
    if quality is not None:
        name = quality.metric.replace("_", " ")
        words = f"{name[:1].upper()}{name[1:]} {_shown(quality, quality.value)}"
        words += (
            f" on {quality.n:,} unseen samples after {_seconds(result.train_seconds)} of training"
        )
        if quality.target is not None and quality.reached_at_s is not None:
            words += (
                f"; the target of {_shown(quality, quality.target)} was reached after "
                f"{_seconds(quality.reached_at_s)}"
            )
        elif quality.target is not None:
            words += f"; the target of {_shown(quality, quality.target)} was not reached"
    else:
        words = f"{result.steps:,} steps in {_seconds(result.train_seconds)} of training"
    if result.speedup is not None and result.baseline:
        words += f". A step is {ratio(result.speedup)} faster than {result.baseline}"
    return f"{words}."


def _shown(quality: TrainQuality, value: float) -> str:
    return f"{value:.4g}" if quality.metric == "loss" else units.percent(value)


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tiles(result: TrainResult) -> list[Tile | None]:
    step, quality = result.step_ms, result.quality
    return [
        Tile(
            name=quality.metric.replace("_", " "),
            figure=_shown(quality, quality.value),
            small=f"{quality.n:,} unseen samples",
        )
        if quality
        else None,
        Tile(
            name="samples per second",
            figure=units.rate(result.samples_per_s),
            small=f"{units.milliseconds(step.p50)} per step" if step else "",
        ),
        Tile(
            name="over the best baseline",
            figure=ratio(result.speedup),
            small=f"{interval(result.speedup)} (95 %), {result.baseline}",
        )
        if result.speedup
        else None,
        limit_tile(result.sol),
        Tile(
            name="training",
            figure=_seconds(result.train_seconds),
            small=f"{result.epochs:.4g} epochs, {result.steps:,} steps",
        ),
    ]


def _changed(result: TrainResult) -> list[str]:
    if result.as_written:
        return []
    return ["The hyper-parameters are not the workload's as written."]


def _loss(history: Sequence[TrainProgress], listed: Element) -> Element:
    values = [at.loss for at in history if at.loss > 0]
    wide = bool(values) and max(values) / min(values) > 20 and len(values) == len(history)
    return curves(
        "Loss",
        "Mean over the steps since the report before." + (" Logarithmic." if wide else ""),
        [Curve(name="loss", kind="c0", moments=[_moment(at, at.loss) for at in history])],
        x=_time(history),
        y=log_around(values) if wide else linear_around(at.loss for at in history),
        x_title="seconds of training",
        x_show=_plain,
        y_show=lambda v: f"{v:.3g}",
        table=listed,
    )


def _quality(
    history: Sequence[TrainProgress], quality: TrainQuality | None, listed: Element
) -> Element | None:
    seen: list[Moment] = []
    last: float | None = None
    for at in history:
        if at.quality is not None and at.quality != last:
            seen.append(_moment(at, at.quality))
            last = at.quality
    if len(seen) < 2:
        return None
    metric = quality.metric if quality else "quality"
    target = quality.target if quality else None
    fractions = metric != "loss" and all(0 <= m.y <= 1 for m in seen)
    heights = [m.y for m in seen] + ([target] if target is not None else [])
    scale = linear_around(heights)
    if fractions:
        scale = Linear(max(0.0, scale.low), min(1.0, scale.high))
    name = metric.replace("_", " ")

    def show(value: float) -> str:
        return f"{100 * value:.4g} %" if fractions else f"{value:.3g}"

    return curves(
        name[:1].upper() + name[1:],
        "Judged on samples that are not trained on; the acceptance samples are yet others.",
        [Curve(name=name, kind="c1", moments=seen, dots=True)],
        x=_time(history),
        y=scale,
        x_title="seconds of training",
        x_show=_plain,
        y_show=show,
        table=listed,
        level=(target, f"target {show(target)}") if target is not None else None,
    )


def _rate(history: Sequence[TrainProgress], listed: Element) -> Element:
    return curves(
        "Samples per second",
        "Of this part of the run, on average so far.",
        [
            Curve(name="samples/s", kind="c2",
                  moments=[_moment(at, at.samples_per_s) for at in history])
        ],
        x=_time(history),
        y=linear_to(at.samples_per_s for at in history),
        x_title="seconds of training",
        x_show=_plain,
        y_show=units.rate,
        table=listed,
    )  # fmt: skip


def _time(history: Sequence[TrainProgress]) -> Linear:
    return Linear(0.0, max(at.seconds for at in history) or 1.0)


def _plain(value: float) -> str:
    return f"{value:g}"


def _moment(at: TrainProgress, y: float) -> Moment:
    return Moment(
        x=at.seconds, y=y, tip=(f"step {at.step:,}, epoch {at.epoch}", f"after {at.seconds:.3g} s")
    )


def _history_table(history: Sequence[TrainProgress]) -> Element:
    columns = [
        Column(name="step", number=True),
        Column(name="epoch", number=True),
        Column(name="seconds", number=True),
        Column(name="loss", number=True),
        Column(name="quality", number=True),
        Column(name="samples/s", number=True),
    ]
    every = -(-len(history) // 200)
    kept = [at for i, at in enumerate(history) if i % every == 0 or i == len(history) - 1]
    rows: list[Row] = [
        [
            Figure.of(at.step, f"{at.step:,}"),
            Figure.of(at.epoch, str(at.epoch)),
            Figure.of(at.seconds, f"{at.seconds:.4g}"),
            Figure.of(at.loss, f"{at.loss:.4g}"),
            Figure.of(at.quality, f"{at.quality or 0:.4g}"),
            Figure.of(at.samples_per_s, units.rate(at.samples_per_s)),
        ]
        for at in kept
    ]
    named = "Course of the run" + (f", every {every}th report" if every > 1 else "")
    return table(named, columns, rows)


def _run(result: TrainResult) -> Element:
    plan = result.plan
    options = sorted(plan.as_plan().options.items())
    return card(
        "The run",
        "",
        facts(
            [
                ("plan", f"{plan.title} ({plan.key})"),
                ("precision", plan.precision),
                ("memory layout", plan.memory_layout),
                *((name.replace("_", " "), str(value)) for name, value in options),
                ("ended because", _STOPPED.get(result.stopped, result.stopped)),
                ("last loss", f"{result.loss:.4g}"),
                ("operations of a step", units.si(result.flops, "FLOP")),
                ("MFU", "" if result.mfu is None else units.share(result.mfu)),
                ("parameters", f"{result.parameters:,}"),
                ("folder", result.run_dir),
                ("all of it took", _seconds(result.seconds_spent)),
            ]
        ),
    )


def _hyper_parameters(result: TrainResult) -> Element:
    named = [(n.replace("_", " "), str(value)) for n, value in result.hyper_parameters.items()]
    about = "What decides how the model learns; the plan decides only how that is computed."
    return card("Hyper-parameters", about, facts(named))
