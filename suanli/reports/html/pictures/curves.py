"""Curves: a quantity over the course of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.reports.html.drawing import Frame, Legend, dot, figure, line, mark, svg, words
from suanli.reports.html.markup import Element, el, group
from suanli.reports.html.scales import Scale

_MOST_POINTS = 240  # of a curve; more than pixels apart they cannot be told from each other

Show = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a curve, and what it says beside its value."""

    x: float
    y: float
    tip: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity over time.

    Attributes:
        dots: Whether each point gets a mark that is seen.
    """

    name: str
    kind: str
    moments: Sequence[Moment]
    dots: bool = False


def curves(  # noqa: PLR0913 - a picture's words, axes and marks
    title: str,
    about: str,
    drawn: Sequence[Curve],
    *,
    x: Scale,
    y: Scale,
    x_title: str,
    x_show: Show,
    y_show: Show,
    table: Element | None,
    level: tuple[float, str] | None = None,
) -> Element:
    """The picture; `level` is a height that matters, with its name."""
    thin = [(curve, thinned(curve.moments)) for curve in drawn]

    def draw(width: float) -> Element:
        frame = Frame(width=width, height=250 if width < 500 else 300, x=x, y=y, left=58)
        behind: list[Element] = []
        if level:
            at, right = frame.py(level[0]), width - frame.right
            behind.append(el("line", class_="target", x1=frame.left, x2=right, y1=at, y2=at))
            behind.append(words(frame.left + 6, at - 5, level[1], kind="halo"))
        return svg(
            width,
            frame.height,
            f"{title} over {x_title}.",
            *frame.axes(x_title, "", x_show, y_show),
            group(behind, aria_hidden="true"),
            *(
                group(
                    [line([(frame.px(m.x), frame.py(m.y)) for m in moments], "curve")],
                    class_=curve.kind,
                )
                for curve, moments in thin
            ),
            *(_marks(frame, curve, moments, y_show) for curve, moments in thin),
        )

    entries = [Legend(mark=f"{c.kind} line", name=c.name) for c in drawn] if len(drawn) > 1 else []
    return figure(title, about, draw, table, entries)


def _marks(frame: Frame, curve: Curve, moments: Sequence[Moment], show: Show) -> Element:
    """The points that can be pointed at: fewer on a phone."""
    most = 24 if frame.narrow else 60
    every = max(1, -(-len(moments) // most))
    chosen = [m for i, m in enumerate(moments) if i % every == 0 or i == len(moments) - 1]
    return group(
        mark(
            (f"{curve.name} {show(m.y)}", *m.tip),
            dot(frame.px(m.x), frame.py(m.y), 3.2 if curve.dots else 1.6),
            el("circle", class_="hit", cx=frame.px(m.x), cy=frame.py(m.y), r=9),
            kind=curve.kind,
        )
        for m in chosen
    )


def thinned(moments: Sequence[Moment]) -> list[Moment]:
    """At most so many points that the picture is the same: the extremes of each stretch stay."""
    if len(moments) <= _MOST_POINTS:
        return list(moments)
    size = -(-len(moments) // (_MOST_POINTS // 2))
    kept: list[Moment] = []
    for begin in range(0, len(moments), size):
        part = moments[begin : begin + size]
        ends = {id(m): m for m in (min(part, key=_height), max(part, key=_height))}
        kept += sorted(ends.values(), key=lambda m: m.x)
    if kept[-1] is not moments[-1]:
        kept.append(moments[-1])
    return kept


def _height(moment: Moment) -> float:
    return moment.y
