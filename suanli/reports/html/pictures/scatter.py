"""A search as a picture: what each trial costs in time, and what it keeps of the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.base.timing import Estimate
from suanli.reports.html.drawing import (
    Frame,
    Legend,
    cut,
    dot,
    figure,
    line,
    mark,
    svg,
    whisker,
    words,
)
from suanli.reports.html.markup import Element, el, group
from suanli.reports.html.scales import Scale

_RADIUS = 5.5  # of a mark, in pixels

Show = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One thing that is judged by two quantities.

    Attributes:
        shape: Of the mark, as in `drawing.dot`.
        ringed: Whether it is the one that was chosen.
        named: Whether its name stands beside it.
        interval: Of `x`, drawn as a whisker.
    """

    name: str
    x: float
    y: float
    kind: str
    shape: str = "circle"
    ringed: bool = False
    named: bool = False
    interval: Estimate | None = None
    tip: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A quantity: its scale, its name, and a value of it in words."""

    scale: Scale
    title: str
    show: Show


def scatter(  # noqa: PLR0913 - a picture's words, axes and marks
    title: str,
    about: str,
    spots: Sequence[Spot],
    *,
    x: Axis,
    y: Axis,
    legend: Sequence[Legend],
    table: Element | None,
    front: Sequence[tuple[float, float]] = (),
    level: tuple[float, str] | None = None,
) -> Element:
    """The picture.

    Args:
        title: Of the picture.
        about: How to read it.
        spots: What is shown.
        x: Horizontal axis.
        y: Vertical axis.
        legend: What the marks stand for.
        table: The same.
        front: Places of those that nothing beats, joined by a line.
        level: A height that matters, with its name.
    """

    def draw(width: float) -> Element:
        frame = Frame(
            width=width,
            height=320 if width < 500 else 380,
            x=x.scale,
            y=y.scale,
            left=60 if width < 500 else 76,
            right=20,
        )
        behind: list[Element] = []
        if front:
            behind.append(line(_stairs([(frame.px(a), frame.py(b)) for a, b in front]), "front"))
        if level:
            at, right = frame.py(level[0]), width - frame.right
            behind.append(el("line", class_="target", x1=frame.left, x2=right, y1=at, y2=at))
            behind.append(words(right, at - 5, level[1], anchor="end", kind="halo"))
        return svg(
            width,
            frame.height,
            f"{title}: {len(spots)} marks.",
            *frame.axes(x.title, y.title, x.show, y.show),
            group(behind, aria_hidden="true"),
            group(_spot(frame, spot) for spot in sorted(spots, key=lambda s: s.ringed)),
            group(_names(frame, spots), aria_hidden="true"),
        )

    return figure(title, about, draw, table, legend)


def _spot(frame: Frame, spot: Spot) -> Element:
    px, py = frame.px(spot.x), frame.py(spot.y)
    shapes = []
    if spot.interval:
        low, high = frame.px(spot.interval.lo95), frame.px(spot.interval.hi95)
        if high - low > 2 * _RADIUS:  # else the mark itself is wider
            shapes.append(whisker(low, high, py))
    shapes.append(dot(px, py, _RADIUS, spot.shape))
    if spot.ringed:
        shapes.append(el("circle", class_="ring", cx=px, cy=py, r=10.5))
    shapes.append(el("circle", class_="hit", cx=px, cy=py, r=13))
    return mark((spot.name, *spot.tip), *shapes, kind=spot.kind)


def _names(frame: Frame, spots: Sequence[Spot]) -> list[Element]:
    """Beside the mark, on the side with more room, where no other name stands."""
    drawn: list[Element] = []
    taken: list[tuple[float, float, float]] = []
    for spot in sorted(spots, key=lambda s: not s.ringed):
        if not spot.named or (frame.narrow and not spot.ringed):
            continue
        px, py = frame.px(spot.x), frame.py(spot.y)
        shown = cut(spot.name, 150 if frame.narrow else 240)
        wide = 6.8 * len(shown)
        to_right = px + 16 + wide < frame.width - 4
        begin = px + 15 if to_right else px - 15 - wide
        near = [b for a, b, w in taken if begin < a + w and a < begin + wide]
        if any(abs(py + 4 - b) < 14 for b in near):
            continue
        taken.append((begin, py + 4, wide))
        kind = "strong halo" if spot.ringed else "halo"
        x = px + 15 if to_right else px - 15
        anchor = "start" if to_right else "end"
        drawn.append(words(x, py + 4, shown, anchor=anchor, kind=kind))
    return drawn


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Steps from point to point: between two of them nothing better was found."""
    steps: list[tuple[float, float]] = []
    for x, y in points:
        if steps:
            steps.append((x, steps[-1][1]))
        steps.append((x, y))
    return steps
