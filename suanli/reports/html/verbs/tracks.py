"""A profile's recorded step as lanes of a timeline."""

from collections.abc import Sequence

from suanli.base import units
from suanli.base.profile_results import OperatorProfile, TraceEvent
from suanli.reports.html.markup import Element
from suanli.reports.html.pictures.timeline import Lane, Slice
from suanli.reports.html.tables import Column, Figure, Row, table

_TRACKS = {"phase": "parts of the step", "host": "host", "device": "device", "data": "loading data"}
_PHASE_KINDS = {"forward": "c0", "backward": "c3", "optimizer": "c1"}
_FAMILIES = (
    ("convolutions", "c0", ("conv",)),
    ("matrix products", "c1", ("mm", "linear", "matmul", "bmm", "addmm", "gemm", "dot")),
    ("attention", "c3", ("attention", "flash", "sdpa")),
    ("normalisation", "c2", ("norm",)),
    ("pooling, reductions", "c4", ("pool", "sum", "mean", "max", "softmax", "loss")),
    ("copies, conversions", "c6", ("copy", "to_copy", "clone", "contiguous", "transpose", "cat")),
)
_OTHER = ("other", "c5")


def lanes(events: Sequence[TraceEvent], operators: Sequence[OperatorProfile]) -> list[Lane]:
    """A lane per track and thread, parts of the step first."""
    groups: dict[tuple[int, int], list[TraceEvent]] = {}
    order = list(_TRACKS)
    for event in events:
        groups.setdefault((order.index(event.track), event.lane), []).append(event)
    several = {track for track, lane in groups if lane > 0}
    return [
        Lane(
            name=_TRACKS[order[track]] + (f" {lane}" if track in several else ""),
            slices=[_slice(event, operators) for event in groups[track, lane]],
        )
        for track, lane in sorted(groups)
    ]


def legend(
    events: Sequence[TraceEvent], operators: Sequence[OperatorProfile]
) -> list[tuple[str, str]]:
    """Families of operators that occur, with the class of their colour."""
    families = [_family(e, operators) for e in events if e.track in ("host", "device")]
    known = [(name, kind) for name, kind, _ in _FAMILIES] + [_OTHER]
    return [pair for pair in known if pair in set(families)]


def event_table(
    events: Sequence[TraceEvent], operators: Sequence[OperatorProfile]
) -> Element | None:
    """Events in order of time, those that take longest where there are very many."""
    columns = [
        Column(name="event", code=True),
        Column(name="track"),
        Column(name="begins", number=True),
        Column(name="takes", number=True),
        Column(name="module", code=True),
    ]
    most = 400
    kept = sorted(events, key=lambda e: -e.duration_ms)[:most]
    rows: list[Row] = [
        [
            event.name,
            _TRACKS[event.track],
            Figure.of(event.start_ms, units.milliseconds(event.start_ms)),
            Figure.of(event.duration_ms, units.milliseconds(event.duration_ms)),
            _module(event, operators),
        ]
        for event in sorted(kept, key=lambda e: e.start_ms)
    ]
    named = "Events of one step"
    if len(events) > most:
        named += f", the longest {most} of {len(events)}"
    return table(named, columns, rows)


def _slice(event: TraceEvent, operators: Sequence[OperatorProfile]) -> Slice:
    if event.track == "phase":
        kind = _PHASE_KINDS.get(event.phase or event.name, "c5")
    elif event.track == "data":
        kind = "c4"
    else:
        kind = _family(event, operators)[1]
    return Slice(
        name=event.name,
        begin_ms=event.start_ms,
        end_ms=event.start_ms + event.duration_ms,
        kind=kind,
        tip=(_module(event, operators), event.phase or ""),
    )


def _family(event: TraceEvent, operators: Sequence[OperatorProfile]) -> tuple[str, str]:
    known = _operator(event, operators)
    name = f"{event.name} {known.name if known else ''}".lower()
    for family, kind, words in _FAMILIES:
        if any(word in name for word in words):
            return family, kind
    return _OTHER


def _module(event: TraceEvent, operators: Sequence[OperatorProfile]) -> str:
    known = _operator(event, operators)
    return known.module if known else ""


def _operator(event: TraceEvent, operators: Sequence[OperatorProfile]) -> OperatorProfile | None:
    index = event.operator
    return operators[index] if index is not None and 0 <= index < len(operators) else None
