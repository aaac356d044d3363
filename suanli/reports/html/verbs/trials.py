"""The trials of a search, for inference and training alike: the picture, and the whole list."""

from collections.abc import Sequence

from suanli.base import units
from suanli.base.plan import Plan
from suanli.base.trial import Trial
from suanli.reports.html.drawing import Legend
from suanli.reports.html.markup import Element, el
from suanli.reports.html.pictures.bounds import STATUS_SHAPE
from suanli.reports.html.pictures.scatter import Axis, Spot, scatter
from suanli.reports.html.scales import linear_around, log_around
from suanli.reports.html.section import card
from suanli.reports.html.tables import Column, Figure, Row, table

_ORDER = {"verified": 0, "rejected": 1, "failed": 2, "skipped": 3}
_LEAST_ERROR = 1e-9  # of a plan that is eager fp32 itself; zero has no place on a log axis


def parts(trials: Sequence[Trial], chosen: Plan | None) -> list[Element | None]:
    """The Pareto picture and the table of all trials."""
    if not trials:
        return []
    listed = trial_table(trials, chosen)
    return [
        pareto(trials, chosen),
        card("Everything that was tried", _tally(trials), listed),
    ]


def pareto(trials: Sequence[Trial], chosen: Plan | None) -> Element | None:
    """Speed against what is kept of the answer; None where fewer than two trials were timed.

    The vertical axis is the workload's own quality where some trial was judged by it, else the
    error of the values against float64.
    """
    by_quality = any(t.quality and t.step_ms for t in trials)
    placed = [t for t in trials if t.step_ms and _height(t, by_quality) is not None]
    if len(placed) < 2:
        return None
    steps = [t.step_ms.p50 for t in placed if t.step_ms]
    heights = [h for t in placed if (h := _height(t, by_quality)) is not None]
    floor = _floor(trials) if by_quality else None
    y = (
        Axis(
            scale=linear_around([*heights, *([floor[0]] if floor else [])]),
            title=f"{_metric(trials)}, higher is better",
            show=lambda v: f"{100 * v:.4g} %",
        )
        if by_quality
        else Axis(
            scale=log_around(heights, 100),
            title="error against float64, lower is better",
            show=lambda v: f"{v:.0e}".replace("e-0", "e-"),
        )
    )
    left_out = sum(1 for t in trials if t.step_ms) - len(placed)
    return scatter(
        "The search: speed against quality",
        _about(by_quality, left_out),
        [_spot(t, by_quality, chosen) for t in placed],
        x=Axis(scale=log_around(steps, 4), title="time of a step", show=units.milliseconds),
        y=y,
        legend=_legend(placed, chosen),
        table=trial_table(placed, chosen),
        front=_front(placed, by_quality),
        level=floor,
    )


def trial_table(trials: Sequence[Trial], chosen: Plan | None) -> Element:
    """Every trial with its outcome and the reason of it."""
    ordered = sorted(trials, key=lambda t: (_ORDER[t.status], t.step_ms.p50 if t.step_ms else 1e99))
    steps = [t.step_ms.p50 for t in trials if t.baseline and t.status == "verified" and t.step_ms]
    best = min(steps, default=None)
    columns = [
        Column(name="plan", wide=True, code=True),
        Column(name="outcome"),
        Column(name="step", number=True, about="median time of one batch, by the search"),
        Column(name="vs baseline", number=True, about="against the best verified baseline"),
        Column(name="quality", number=True),
        Column(name="error", number=True, about="largest relative rms error against float64"),
        Column(name="took", number=True, about="building, timing and verifying"),
        Column(name="reason", wide=True),
    ]
    rows: list[Row] = []
    kinds: list[str] = []
    for t in ordered:
        step = t.step_ms.p50 if t.step_ms else None
        gain = best / step if best and step else None
        error = t.values.relative_rms if t.values else None
        quality = t.quality.value if t.quality else None
        rows.append(
            [
                t.plan.title,
                _outcome(t, chosen),
                Figure.of(step, units.milliseconds(step or 0.0)),
                Figure.of(gain, f"{gain or 0:.2f}×"),
                Figure.of(quality, units.percent(quality or 0.0)),
                Figure.of(error, f"{error or 0:.2g}"),
                Figure.of(t.seconds_spent or None, f"{t.seconds_spent:.1f} s"),
                t.reason,
            ]
        )
        is_chosen = t.plan == chosen and t.status == "verified"
        kinds.append("chosen-row" if is_chosen else "quiet" if t.status == "skipped" else "")
    return table("Trials of the search", columns, rows, kinds=kinds)


def _outcome(trial: Trial, chosen: Plan | None) -> Element:
    more = ", baseline" if trial.baseline else ""
    if trial.plan == chosen and trial.status == "verified":
        more += ", chosen"
    if trial.resumed:
        more += ", from an earlier search"
    return el("span", el("span", trial.status, class_=f"status {trial.status}"), more)


def _height(trial: Trial, by_quality: bool) -> float | None:
    if by_quality:
        if trial.quality:
            return trial.quality.value
        # a plan in floating point whose values are right answers as the reference does
        return None
    error = trial.values.relative_rms if trial.values else None
    return None if error is None else max(error, _LEAST_ERROR)


def _spot(trial: Trial, by_quality: bool, chosen: Plan | None) -> Spot:
    assert trial.step_ms is not None
    height = _height(trial, by_quality)
    assert height is not None
    ringed = trial.plan == chosen and trial.status == "verified"
    judged = f"quality {units.percent(height)}" if by_quality else f"relative error {height:.2g}"
    return Spot(
        name=trial.plan.title,
        x=trial.step_ms.p50,
        y=height,
        kind="chosen"
        if ringed
        else "plain"
        if trial.baseline and trial.status == "verified"
        else trial.status,
        shape="square"
        if trial.baseline and trial.status == "verified"
        else STATUS_SHAPE[trial.status],
        ringed=ringed,
        named=ringed or trial.baseline,
        interval=trial.step_ms,
        tip=(
            f"{units.milliseconds(trial.step_ms.p50)}, {judged}",
            f"{trial.status}{', baseline' if trial.baseline else ''}{', chosen' if ringed else ''}",
            trial.reason,
        ),
    )


def _front(trials: Sequence[Trial], by_quality: bool) -> list[tuple[float, float]]:
    """Verified trials that none beats in both, from the fastest to the slowest."""
    known = [
        (t.step_ms.p50, height)
        for t in trials
        if t.status == "verified" and t.step_ms and (height := _height(t, by_quality)) is not None
    ]
    found: list[tuple[float, float]] = []
    for step, height in sorted(known, key=lambda place: place[0]):
        better = not found or (height > found[-1][1] if by_quality else height < found[-1][1])
        if better:
            found.append((step, height))
    return found if len(found) > 1 else []


def _floor(trials: Sequence[Trial]) -> tuple[float, str] | None:
    """The reference's quality."""
    known = [t.quality for t in trials if t.quality]
    return (known[0].reference, "eager fp32") if known else None


def _metric(trials: Sequence[Trial]) -> str:
    return next((t.quality.metric.replace("_", " ") for t in trials if t.quality), "quality")


def _about(by_quality: bool, left_out: int) -> str:
    upwards = "up" if by_quality else "down"
    words = (
        f"Left is faster, {upwards} is closer to the reference; the dashed line joins the verified "
        "plans that no other beats in both."
    )
    if left_out:
        plans = "trial was" if left_out == 1 else "trials were"
        words += f" {left_out} more {plans} timed but not judged by this: the table below has them."
    return words


def _legend(trials: Sequence[Trial], chosen: Plan | None) -> list[Legend]:
    entries = [Legend(mark="chosen ring", name="chosen")] if chosen else []
    if any(t.baseline and t.status == "verified" for t in trials):
        entries.append(Legend(mark="plain square", name="baseline"))
    kinds = {t.status for t in trials if not (t.baseline and t.status == "verified")}
    entries += [
        Legend(mark=f"{status} {STATUS_SHAPE[status]}", name=status)
        for status in STATUS_SHAPE
        if status in kinds
    ]
    return entries


def _tally(trials: Sequence[Trial]) -> str:
    counts = [(s, sum(t.status == s for t in trials)) for s in _ORDER]
    said = ", ".join(f"{n} {status}" for status, n in counts if n)
    return f"{said}. Rejected, failed and skipped ones say why."
