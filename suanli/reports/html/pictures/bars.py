"""Bars: from a measured time down to its limit, quantities side by side, a whole and its parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.base.timing import Estimate
from suanli.reports.html.drawing import (
    LETTER,
    Legend,
    cut,
    figure,
    mark,
    svg,
    whisker,
    words,
)
from suanli.reports.html.markup import Element, el
from suanli.reports.html.scales import linear_to

_ROW, _BAR = 34.0, 20.0
_NARROW_ROW = 46.0  # the name stands above its bar

Show = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row.

    Attributes:
        begin: Where the bar begins; 0 but in a waterfall.
        kind: Its class, which is its colour.
        tip: What it says beside name and value.
        interval: Drawn as a whisker.
        strong: Whether the row is a sum, or the one that matters.
    """

    name: str
    end: float
    begin: float = 0.0
    kind: str = "plain"
    tip: Sequence[str] = ()
    interval: Estimate | None = None
    strong: bool = False


def bars(
    title: str,
    about: str,
    rows: Sequence[Bar],
    show: Show,
    table: Element | None,
) -> Element:
    """Horizontal bars from a common zero."""
    return figure(title, about, lambda width: _drawn(width, title, rows, show), table)


def waterfall(
    title: str,
    about: str,
    *,
    whole: Bar,
    losses: Sequence[Bar],
    limit: Bar,
    show: Show,
    table: Element | None,
) -> Element:
    """From the measured time down to the limit: each loss begins where the one above it ended.

    Args:
        title: Of the picture.
        about: How to read it.
        whole: The measured time.
        losses: By cause; `end` is the size of each.
        limit: What is left.
        show: A value in words.
        table: The same.
    """
    rows, left = [whole], whole.end
    for loss in losses:
        below = max(0.0, left - loss.end)
        rows.append(Bar(name=loss.name, begin=below, end=left, kind=loss.kind, tip=loss.tip))
        left = below
    rows.append(limit)
    return figure(title, about, lambda width: _drawn(width, title, rows, show), table)


def _drawn(width: float, title: str, rows: Sequence[Bar], show: Show) -> Element:
    narrow = width < 500
    longest = max((len(r.name) * (1.15 if r.strong else 1.0) for r in rows), default=0.0)
    left = 0.0 if narrow else min(320.0, 18 + LETTER * longest)
    right = 16 + LETTER * max(len(show(r.end - r.begin)) for r in rows)
    row_height = _NARROW_ROW if narrow else _ROW
    highest = [r.end for r in rows] + [r.interval.hi95 for r in rows if r.interval]
    scale = linear_to(highest)

    def place(value: float) -> float:
        return left + scale(value) * (width - left - right)

    drawn: list[Element] = []
    for index, row in enumerate(rows):
        top = index * row_height + (20 if narrow else 4)
        drawn += _row(row, top, place, show, left)
        if not narrow and index + 1 < len(rows) and rows[index + 1].begin > 0:
            x, below = place(row.begin or row.end), top + row_height
            drawn.append(el("line", class_="link", x1=x, x2=x, y1=top + _BAR, y2=below))
    height = len(rows) * row_height + 6
    return svg(width, height, f"{title}: {len(rows)} bars.", *drawn)


def _row(
    row: Bar, top: float, place: Callable[[float], float], show: Show, left: float
) -> list[Element]:
    begin, end = place(row.begin), place(row.end)
    value = show(row.end - row.begin)
    shapes = [el("rect", x=begin, y=top, width=max(1.5, end - begin), height=_BAR, rx=3)]
    middle = top + _BAR / 2
    if row.interval:
        shapes.append(whisker(place(row.interval.lo95), place(row.interval.hi95), middle))
    kind = "strong" if row.strong else "ink"
    after = max(end, place(row.interval.hi95) if row.interval else end)
    name = (
        words(left - 12, middle + 4, cut(row.name, left - 12), anchor="end", kind=kind)
        if left
        else words(0, top - 5, row.name, kind=kind)
    )
    return [
        name,
        mark((row.name, value, *row.tip), *shapes, kind=row.kind),
        words(after + 8, middle + 4, value, kind=kind),
    ]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a whole."""

    name: str
    value: float
    kind: str
    tip: Sequence[str] = ()


def stack(
    title: str,
    about: str,
    parts: Sequence[Part],
    show: Show,
    table: Element | None,
    *,
    room: float | None = None,
    room_name: str = "",
) -> Element:
    """One bar cut into its parts; `room` is how much there could be, drawn behind it."""
    known = [part for part in parts if part.value > 0]
    total = sum(part.value for part in known)

    def draw(width: float) -> Element:
        scale = linear_to([total, room or 0.0])
        x, drawn = 0.0, []
        if room:
            drawn.append(
                el("rect", class_="track", x=0.0, y=22, width=scale(room) * width, height=34, rx=4)
            )
            shown = f"{room_name} {show(room)}"
            drawn.append(words(scale(room) * width, 14, shown, anchor="end"))
        drawn.append(words(0, 14, show(total), kind="strong"))
        for part in known:
            wide = scale(part.value) * width
            shapes = [el("rect", x=x, y=22, width=max(1.0, wide - 1), height=34, rx=2)]
            label = show(part.value)
            if wide > LETTER * len(label) + 12:
                shapes.append(words(x + wide / 2, 43, label, anchor="middle", kind="on"))
            tip = (part.name, label, f"{100 * part.value / total:.1f} %", *part.tip)
            drawn.append(mark(tip, *shapes, kind=part.kind))
            x += wide
        return svg(width, 60, f"{title}: {len(known)} parts.", *drawn)

    entries = [Legend(mark=f"{p.kind} square", name=f"{p.name} {show(p.value)}") for p in known]
    return figure(title, about, draw, table, entries)
