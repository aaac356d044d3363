"""What ran when in one step, a lane per thread or stream, with zoom."""

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base import units
from suanli.reports.html.drawing import Legend, caption, folded, legend_of, mark
from suanli.reports.html.markup import Element, el

_WIDTH = 1000.0  # of a lane, in units of its own: it is stretched to the page
_LEAST = 0.25  # narrower slices of one kind that touch are drawn as one
_MARKS = 6  # of the ruler below


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Something that ran, in milliseconds from the beginning of the step."""

    name: str
    begin_ms: float
    end_ms: float
    kind: str
    tip: Sequence[str] = ()

    @property
    def ms(self) -> float:
        """How long it took."""
        return self.end_ms - self.begin_ms


@dataclass(frozen=True, kw_only=True)
class Lane:
    """What ran on one thread or stream."""

    name: str
    slices: Sequence[Slice]


def timeline(
    title: str,
    about: str,
    lanes: Sequence[Lane],
    table: Element | None,
    legend: Sequence[Legend] = (),
) -> Element | None:
    """The picture, or None where nothing was recorded. Lanes share one axis from zero."""
    length = max((s.end_ms for lane in lanes for s in lane.slices), default=0.0)
    if length <= 0:
        return None
    ruler = [units.milliseconds(length * i / (_MARKS - 1)) if i else "0" for i in range(_MARKS)]
    inner = el(
        "div",
        *(part for lane in lanes for part in _lane(lane, length)),
        el("div", *(el("span", shown) for shown in ruler), class_="ruler", aria_hidden="true"),
        class_="lanes-inner",
    )
    buttons = [("0.5", "−", "Zoom out"), ("2", "+", "Zoom in"), ("0", "Whole step", "Show all")]
    return el(
        "figure",
        caption(title, about),
        legend_of(legend),
        el("div", inner, class_="lanes", tabindex="0", role="region", aria_label=title),
        el(
            "div",
            *(
                el("button", shown, type="button", data_zoom=by, aria_label=name)
                for by, shown, name in buttons
            ),
            class_="zoom needs-script",
        ),
        folded(table),
    )


def _lane(lane: Lane, length: float) -> list[Element]:
    scale = _WIDTH / length
    drawn = [el("rect", class_="track", x=0, y=0, width=_WIDTH, height=34)]
    for piece in merged(lane.slices, _LEAST / scale):
        shape = el(
            "rect",
            x=piece.begin_ms * scale,
            y=2,
            width=max(_LEAST, piece.ms * scale),
            height=30,
        )
        tip = (
            piece.name,
            f"{units.milliseconds(piece.ms)}, from {units.milliseconds(piece.begin_ms)}",
            *piece.tip,
        )
        drawn.append(mark(tip, shape, kind=piece.kind))
    picture = el(
        "svg",
        *drawn,
        viewBox=f"0 0 {_WIDTH:.0f} 34",
        preserveAspectRatio="none",
        role="group",
        aria_label=f"{lane.name}: {len(lane.slices)} events. Arrow keys go from one to the next.",
        tabindex="0",
        class_="drawing",
    )
    return [el("div", lane.name, class_="lane-name"), picture]


def merged(slices: Sequence[Slice], least_ms: float) -> list[Slice]:
    """Slices in order; short ones of one kind that stand side by side become one.

    What is merged says how many it stands for: nothing is dropped. The hundreds of events of a
    microsecond each, which no screen can show, would otherwise be most of the page.
    """
    found: list[list[Slice]] = []
    for piece in sorted(slices, key=lambda s: s.begin_ms):
        last = found[-1] if found else None
        alike = last is not None and last[-1].kind == piece.kind
        close = last is not None and piece.begin_ms - last[-1].end_ms < least_ms
        short = last is not None and max(piece.ms, last[-1].ms) < least_ms
        if last is not None and alike and close and short:
            last.append(piece)
        else:
            found.append([piece])
    return [_joined(run) for run in found]


def _joined(run: Sequence[Slice]) -> Slice:
    if len(run) == 1:
        return run[0]
    longest = max(run, key=lambda s: s.ms)
    return Slice(
        name=f"{len(run)} short operators",
        begin_ms=run[0].begin_ms,
        end_ms=max(s.end_ms for s in run),
        kind=run[0].kind,
        tip=(f"the longest is {longest.name}",),
    )
