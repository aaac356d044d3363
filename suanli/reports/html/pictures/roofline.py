"""The roofline: operations per second against operations per byte, under the measured ceilings.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52 (4), 2009.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base import units
from suanli.base.hardware import Ceiling
from suanli.base.work import BoundBy
from suanli.reports.html.drawing import (
    LETTER,
    Frame,
    Legend,
    cut_left,
    dot,
    figure,
    line,
    mark,
    svg,
    words,
)
from suanli.reports.html.markup import Element, group
from suanli.reports.html.pictures.bounds import CLASS, SHAPE, legend
from suanli.reports.html.scales import Log, log_around

_DECADES = 5.0  # of the vertical axis; what lies lower is drawn at its foot
_NAMED = 3  # points that get their name in a wide picture
_LEAST_APART = 13.0  # pixels between two lines of text


@dataclass(frozen=True, kw_only=True)
class Point:
    """An operator, or a whole step.

    Attributes:
        flops: Operations of one step.
        bytes: Bytes of one step.
        time_ms: What it takes in one step.
        share: Of the step's time, 0 to 1; the area of the point follows it.
    """

    name: str
    flops: float
    bytes: float
    time_ms: float
    share: float
    bound_by: BoundBy

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.flops / (self.time_ms * 1e-3)


@dataclass(frozen=True, kw_only=True)
class Roof:
    """A peak in FLOP/s, or a bandwidth in B/s, by name."""

    name: str
    value: float


def peaks(ceilings: Sequence[Ceiling]) -> list[Roof]:
    """The most operations per second by element type, highest first."""
    best: dict[str, float] = {}
    for item in ceilings:
        if item.what == "matmul" and item.dtype and item.best:
            best[item.dtype] = max(best.get(item.dtype, 0.0), item.best)
    return [Roof(name=k, value=v) for k, v in sorted(best.items(), key=lambda kv: -kv[1])]


def bandwidths(ceilings: Sequence[Ceiling]) -> list[Roof]:
    """Read bandwidths by the size of the data, the largest size (main memory) first."""
    reads = [c for c in ceilings if c.what == "read" and c.best and c.working_set_bytes]
    reads.sort(key=lambda c: -(c.working_set_bytes or 0))
    return [Roof(name=units.size(c.working_set_bytes or 0), value=c.best or 0.0) for c in reads]


def roofline(
    points: Sequence[Point],
    ceilings: Sequence[Ceiling],
    about: str,
    table: Element | None,
) -> Element | None:
    """The picture, or None where no ceilings are known."""
    tops, slopes = peaks(ceilings), bandwidths(ceilings)
    if not tops or not slopes:
        return None
    placed = [p for p in points if p.flops > 0 and p.bytes > 0 and p.time_ms > 0]
    entries = [Legend(mark="line plain", name="ceiling"), *legend(p.bound_by for p in placed)]

    def draw(width: float) -> Element:
        frame = _frame(width, placed, tops, slopes)
        label = f"Roofline with {len(placed)} operators under {len(tops)} ceilings."
        return svg(
            width,
            frame.height,
            label,
            *frame.axes(
                "operations per byte", "operations per second", _plain, lambda v: units.si(v, "")
            ),
            group(_roofs(frame, tops, slopes), aria_hidden="true"),
            group(_marks(frame, placed)),
            group([] if frame.narrow else _names(frame, placed), aria_hidden="true"),
        )

    return figure("Roofline", about, draw, table, entries)


def _frame(
    width: float, points: Sequence[Point], tops: Sequence[Roof], slopes: Sequence[Roof]
) -> Frame:
    top = max(roof.value for roof in tops)
    low = min([roof.value / 30 for roof in tops] + [p.rate / 2 for p in points])
    ridges = [tops[0].value / slopes[0].value, tops[-1].value / slopes[-1].value]
    x = log_around([*(p.intensity for p in points), *ridges, ridges[0] * 6, ridges[-1] / 20])
    return Frame(
        width=width,
        height=340 if width < 500 else 430,
        x=x,
        y=Log(max(low, top / 10**_DECADES), top * 1.8),
        left=50 if width < 500 else 62,
    )


def _roofs(frame: Frame, tops: Sequence[Roof], slopes: Sequence[Roof]) -> list[Element]:
    """Main memory's bandwidth under each peak, and the caches' under the highest one."""
    assert isinstance(frame.x, Log) and isinstance(frame.y, Log)
    low, high = frame.x.low, frame.x.high
    drawn = []
    for index, slope in reversed(list(enumerate(slopes))):
        start = max(low, frame.y.low / slope.value)
        for top in tops if index == 0 else tops[:1]:
            ridge = min(high, top.value / slope.value)
            places = [(start, slope.value * start), (ridge, slope.value * ridge), (high, top.value)]
            kind = "roof" if index == 0 else "roof other"
            drawn.append(line([(frame.px(a), frame.py(b)) for a, b in places], kind))
    drawn += _peak_names(frame, tops)
    return drawn + _slope_names(frame, slopes, tops[0].value)


def _peak_names(frame: Frame, tops: Sequence[Roof]) -> list[Element]:
    drawn, last = [], -math.inf
    for top in tops:
        y = max(frame.py(top.value) - 5, last + _LEAST_APART)
        last = y
        shown = f"{top.name} {units.si(top.value, 'FLOP/s')}"
        drawn.append(words(frame.width - frame.right - 2, y, shown, anchor="end", kind="halo ink"))
    return drawn


def _slope_names(frame: Frame, slopes: Sequence[Roof], peak: float) -> list[Element]:
    """The bandwidths of main memory and of the smallest cache, beside their lines."""
    assert isinstance(frame.x, Log) and isinstance(frame.y, Log)
    ends = [slopes[0], slopes[-1]] if len(slopes) > 1 else [slopes[0]]
    drawn = []
    for slope in ends:
        low = max(frame.x.low, frame.y.low / slope.value)
        at = math.sqrt(low * min(peak / slope.value, frame.x.high))
        size = "" if frame.narrow else f" ({slope.name})"
        shown = f"{units.si(slope.value, 'B/s')}{size}"
        first = slope is slopes[0]
        x, y = frame.px(at), frame.py(slope.value * at)
        drawn.append(
            words(x + 8, y + 14, shown, kind="halo ink")
            if first
            else words(x - 8, y - 6, shown, anchor="end", kind="halo")
        )
    return drawn


def _marks(frame: Frame, points: Sequence[Point]) -> list[Element]:
    """Large ones first, so that small ones lie on top of them."""
    drawn = []
    for p in sorted(points, key=lambda p: -p.share):
        radius = (2.5 if frame.narrow else 3.0) + 16 * math.sqrt(min(1.0, p.share))
        tip = (
            p.name,
            f"{units.milliseconds(p.time_ms)}, {units.share(p.share)} of the step",
            f"{units.si(p.rate, 'FLOP/s')} at {p.intensity:.3g} FLOP/byte",
            f"bound by {p.bound_by}",
        )
        shape = dot(frame.px(p.intensity), frame.py(p.rate), radius, SHAPE[p.bound_by])
        drawn.append(mark(tip, shape, kind=CLASS[p.bound_by]))
    return drawn


def _names(frame: Frame, points: Sequence[Point]) -> list[Element]:
    """Names of the points that take most, where they do not run into each other."""
    drawn: list[Element] = []
    taken: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: -p.share)[: 3 * _NAMED]:
        x, y = frame.px(p.intensity), frame.py(p.rate) + 24 + 10 * math.sqrt(p.share)
        clear = all(abs(y - b) > _LEAST_APART or abs(x - a) > 150 for a, b in taken)
        if clear and len(drawn) < _NAMED and y < frame.height - frame.bottom - 4:
            taken.append((x, y))
            shown = cut_left(p.name, 150)
            half = len(shown) * LETTER / 2
            middle = min(max(x, frame.left + half + 4), frame.width - half)
            drawn.append(words(middle, y, shown, anchor="middle", kind="halo"))
    return drawn


def _plain(value: float) -> str:
    return f"{value:g}" if value < 1e4 else units.si(value, "").strip()
