"""What to change, with the gain to expect and, where it was tried, the gain that came."""

from collections.abc import Sequence

from suanli.base.profile_results import Advice
from suanli.reports.html.markup import Element, el
from suanli.reports.html.pictures.bars import Bar, bars
from suanli.reports.html.section import card, interval, ratio
from suanli.reports.html.tables import Column, Figure, Row, table


def advice(changes: Sequence[Advice]) -> Element:
    """The ranked list: a picture where something was tried, else the table alone."""
    if not changes:
        about = "No change is known that the cost model expects a gain from."
        return card("What to change", about)
    listed = _table(changes)
    if not any(change.measured_speedup for change in changes):
        about = "The gains are expected by the cost model; --check tries the first ones."
        return card("What to change first", about, listed)
    rows: list[Bar] = []
    for change in changes:
        expected = change.expected_speedup
        rows.append(Bar(name=change.change, end=expected, kind="c5", tip=("expected",)))
        if change.measured_speedup:
            rows.append(
                Bar(
                    name="measured",
                    end=change.measured_speedup.p50,
                    kind="chosen",
                    interval=change.measured_speedup,
                    strong=True,
                    tip=(change.change, f"95 %: {interval(change.measured_speedup)}"),
                )
            )
    return el(
        "div",
        bars(
            "What to change first",
            "Grey is the gain that the cost model expects, coloured the one that was measured. "
            "1× is the step as it is.",
            rows,
            lambda value: f"{value:.2f}×",
            listed,
        ),
        class_="plain-group",
    )


def _table(changes: Sequence[Advice]) -> Element:
    columns = [
        Column(name="change", wide=True),
        Column(name="expected", number=True),
        Column(name="measured", number=True),
        Column(name="why", wide=True),
        Column(name="how", wide=True, code=True),
    ]
    rows: list[Row] = []
    for change in changes:
        measured = change.measured_speedup
        seen = Figure.of(
            measured.p50 if measured else None,
            f"{ratio(measured)} ({interval(measured)})" if measured else "",
        )
        if change.failed:
            seen = Figure(shown=f"failed: {change.failed}", value=None)
        expected = Figure.of(change.expected_speedup, f"{change.expected_speedup:.2f}×")
        rows.append([change.change, expected, seen, change.reason, change.how])
    return table("Changes, the largest expected gain first", columns, rows)
