"""The pages of the server: the list of what is there, a result, and work as it goes on.

Each is a list of parts. The live stream sends the parts again when a file has changed, and the
browser puts in those that differ.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path

from suanli.base import events_log, units
from suanli.base.errors import SuanliError
from suanli.base.events import Event
from suanli.base.events_log import Line
from suanli.base.train_results import TrainProgress
from suanli.base.trial import Trial
from suanli.reports import subjects
from suanli.reports.html import report
from suanli.reports.html.markup import Element, el
from suanli.reports.html.page import asset, document
from suanli.reports.html.section import Section, Tile, card
from suanli.reports.html.tables import Column, Figure, Row, table
from suanli.reports.html.verbs import train, trials
from suanli.reports.ui.listing import Entry, entries, state_of

_METRICS = "metrics.jsonl"
_STATE_KIND = {"live": "verified", "done": "plain", "stopped": "rejected", "failed": "failed",
               "broken off": "failed"}  # fmt: skip
_LAST_EVENTS = 30


def list_parts(folder: Path) -> list[Element]:
    """The folder's results, the newest first."""
    listed = entries(folder)
    head = el(
        "div",
        el("p", "suanli ui", class_="kicker"),
        el("h1", folder.name or str(folder)),
        el("p", f"{len(listed)} results in {folder}", class_="about"),
    )
    if not listed:
        hint = "Write one with `suanli optimize WORKLOAD -o FOLDER`, or keep what --json prints."
        return [head, card("Nothing here yet", hint)]
    columns = [
        Column(name="name", wide=True),
        Column(name="what"),
        Column(name="state"),
        Column(name="changed", number=True),
    ]
    return [head, card("Results", "", table("Results", columns, [_row(e) for e in listed]))]


def result_parts(entry: Entry) -> list[Element]:
    """One result; or the work that will give it, as far as it is."""
    back = el("p", el("a", "All results", href="/"), class_="about")
    try:
        lines = events_log.read(entry.events) if entry.events else []
        if lines and state_of(lines) != "done":
            return [back, *_going_on(entry, lines)]
        path = entry.path or entry.events
        assert path is not None
        return [back, report.section(subjects.read(path)).body("result-1", "h1")]
    except SuanliError as error:
        return [back, el("h1", entry.name), el("p", str(error), class_="verdict")]


def page(title: str, parts: Sequence[Element], stream: str) -> str:
    """A whole page that listens for newer parts at `stream`."""
    live = el("div", *(el("div", part) for part in parts), id="live", data_stream=stream)
    foot = "Served to this machine alone. It changes by itself while work goes on."
    return document(title, [live], foot=foot, more_script=asset_of_ui(), live=True)


def asset_of_ui() -> str:
    """The script that takes in newer parts."""
    return asset("ui.js", "suanli.reports.ui")


def _row(entry: Entry) -> Row:
    what, state = "", "done"
    if entry.events:
        try:
            lines = events_log.read(entry.events)
        except SuanliError:
            lines = []
        begin = next((line.begin for line in lines if line.begin), None)
        what = f"{begin.verb} {begin.workload}" if begin else ""
        state = state_of(lines)
    if not what and entry.path is not None:
        what = _kind(entry.path)
    when = datetime.datetime.fromtimestamp(entry.changed, datetime.UTC).astimezone()
    return [
        el("a", entry.name, href=f"/result/{entry.ident}"),
        what,
        _state(state),
        Figure.of(entry.changed, f"{when:%Y-%m-%d %H:%M:%S}"),
    ]


def _kind(path: Path) -> str:
    if path.is_dir():
        return "training run" if subjects.is_run(path) else "engine"
    return subjects.schema_of(path).removeprefix("suanli.")


def _state(state: str) -> Element:
    pulse = " pulse" if state == "live" else ""
    return el("span", state, class_=f"status {_STATE_KIND.get(state, 'plain')}{pulse}")


def _going_on(entry: Entry, lines: Sequence[Line]) -> list[Element]:
    """Work that has not come to its end: where it stands, its trials, its course."""
    begin = next((line.begin for line in reversed(lines) if line.begin), None)
    state = state_of(list(lines))
    events = [(line.at, line.event) for line in lines if line.event is not None]
    done = [event.trial for _, event in events if event.trial is not None]
    course = _course(entry, [event for _, event in events])
    steps = [event for _, event in events if event.kind == "step"]
    began = next((line.at for line in lines if line.begin), 0.0)
    now = lines[-1].at
    head = Section(
        verb=begin.verb if begin else "",
        title=begin.workload if begin else entry.name,
        about=entry.name,
        verdict=_verdict(state, steps[-1].text if steps else "", lines),
        tiles=[tile for tile in _tiles(done, course, now - began, events) if tile],
        parts=[],
        notes=[event.text for _, event in events if event.kind == "note"][-6:],
    )
    parts = [head.body("result-1", "h1")]
    parts += [part for part in train.course(course, None) if part is not None]
    parts += [part for part in trials.parts(done, None) if part is not None]
    return [*parts, _log(events, began)]


def _verdict(state: str, step: str, lines: Sequence[Line]) -> str:
    if state == "live":
        return f"Going on: {step}" if step else "Going on."
    ends = [line.end for line in lines if line.end is not None]
    if state == "failed" and ends:
        return f"Failed: {ends[-1].error}"
    if state == "broken off":
        return "The process is gone and left no result: it was killed, or the machine went down."
    return "Stopped early."


def _course(entry: Entry, events: Sequence[Event]) -> tuple[TrainProgress, ...]:
    """The run's own metrics, which survive a resume; else what the events tell."""
    if entry.path is not None and entry.path.is_dir():
        kept = subjects.read_history(entry.path / _METRICS)
        if kept:
            return kept
    return tuple(event.progress for event in events if event.progress is not None)


def _fastest(done: Sequence[Trial]) -> Trial | None:
    verified = [t for t in done if t.status == "verified" and t.step_ms is not None]
    return min(verified, key=lambda t: t.step_ms.p50 if t.step_ms else 0.0, default=None)


def _tiles(
    done: Sequence[Trial],
    course: Sequence[TrainProgress],
    spent_s: float,
    events: Sequence[tuple[float, Event]],
) -> list[Tile | None]:
    best, at = _fastest(done), course[-1] if course else None
    budget = next((e.budget_s for _, e in reversed(events) if e.budget_s), None)
    spent = next((e.spent_s for _, e in reversed(events) if e.spent_s is not None), spent_s)
    return [
        Tile(
            name="time spent",
            figure=f"{spent:.0f} s" if at is None else f"{at.seconds:.0f} s",
            small=f"of {budget:.0f} s" if budget and at is None else "",
        ),
        Tile(name="trials", figure=str(len(done))) if done else None,
        Tile(
            name="fastest verified so far",
            figure=units.milliseconds(best.step_ms.p50),
            small=best.plan.title,
        )
        if best and best.step_ms
        else None,
        Tile(
            name="done",
            figure=f"{100 * at.done:.0f} %",
            small=f"epoch {at.epoch} of {at.epochs}",
        )
        if at
        else None,
        Tile(name="loss", figure=f"{at.loss:.4g}") if at else None,
        Tile(name="samples per second", figure=units.rate(at.samples_per_s)) if at else None,
    ]


def _log(events: Sequence[tuple[float, Event]], began: float) -> Element:
    columns = [
        Column(name="after", number=True),
        Column(name="kind"),
        Column(name="what", wide=True),
    ]
    told = [pair for pair in events if pair[1].kind != "progress"][-_LAST_EVENTS:]
    rows: list[Row] = []
    for at, event in reversed(told):
        text = event.text
        if event.trial is not None:
            text = f"{event.trial.plan.title}: {event.trial.status} {event.trial.reason}".strip()
        rows.append([Figure.of(at - began, f"{at - began:.1f} s"), event.kind, text])
    return card("What it said", "The newest first.", table("Events", columns, rows))
