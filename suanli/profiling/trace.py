"""The step as a timeline: in the result, and as a file for Perfetto and Chrome."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suanli.base.errors import BadInputError
from suanli.base.files import write_atomic
from suanli.base.profile_results import OperatorProfile, ProfileResult, TraceEvent
from suanli.engines.backend import LayerTime
from suanli.profiling.joining import Joined
from suanli.profiling.recording import Recording

_MOST = 4000  # events; the longest are kept
_LANES = {"phase": 1, "host": 2, "data": 3, "device": 10}


def timeline(
    recording: Recording, joined: Sequence[Joined], rows: Sequence[OperatorProfile]
) -> tuple[TraceEvent, ...]:
    """Events of one recorded step, the profiler's own cost in them.

    Args:
        recording: The step.
        joined: Its calls.
        rows: The table, so that events can point into it.
    """
    places = {(r.phase, r.name, r.module, r.source): i for i, r in enumerate(rows)}
    events = [
        TraceEvent(
            name=part,
            track="phase" if part != "data" else "data",
            start_ms=start,
            duration_ms=end - start,
            phase=None if part == "data" else part,
        )
        for part, start, end in recording.parts
    ]
    for j in joined:
        name = j.operator.name if j.operator else j.node.name.rpartition("::")[2].rstrip("_")
        events.append(
            TraceEvent(
                name=name,
                track="host",
                start_ms=j.node.start_ms,
                duration_ms=j.node.ms,
                operator=places.get((j.phase, name, j.module, j.source)),
                phase=j.phase,
            )
        )
    events += [
        TraceEvent(name=n.name, track="data", start_ms=n.start_ms, duration_ms=n.ms, lane=1)
        for n in recording.aside
    ]
    streams = {stream: i for i, stream in enumerate(sorted({k.stream for k in recording.device}))}
    events += [
        TraceEvent(
            name=k.name,
            track="device",
            start_ms=k.start_ms,
            duration_ms=k.end_ms - k.start_ms,
            lane=streams[k.stream],
        )
        for k in recording.device
    ]
    return _longest(events)


def of_layers(
    layers: Sequence[LayerTime], rows: Sequence[OperatorProfile], scale: float
) -> tuple[TraceEvent, ...]:
    """Layers one after the other, as a backend's counters know no beginnings."""
    places = {row.kernel: i for i, row in enumerate(rows) if row.kernel}
    events, at = [], 0.0
    for layer in layers:
        ms = layer.time_ms * scale
        events.append(
            TraceEvent(
                name=layer.name,
                track="host",
                start_ms=at,
                duration_ms=ms,
                operator=places.get(layer.name),
                phase="forward",
            )
        )
        at += ms
    return _longest(events)


def _longest(events: list[TraceEvent]) -> tuple[TraceEvent, ...]:
    if len(events) > _MOST:
        events = sorted(events, key=lambda e: -e.duration_ms)[:_MOST]
    return tuple(sorted(events, key=lambda e: e.start_ms))


def chrome(result: ProfileResult) -> dict[str, Any]:
    """The timeline in Chrome's trace event format, which Perfetto reads too.

    Format: "Trace Event Format" of the Chromium project; complete events ("X"), microseconds.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": result.workload}}
    ]
    seen: set[tuple[str, int]] = set()
    for event in result.trace:
        thread = _LANES[event.track] + event.lane
        if (event.track, event.lane) not in seen:
            seen.add((event.track, event.lane))
            label = event.track if not event.lane else f"{event.track} {event.lane}"
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": 1,
                    "tid": thread,
                    "args": {"name": label},
                }
            )
        events.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.phase or event.track,
                "pid": 1,
                "tid": thread,
                "ts": 1e3 * event.start_ms,
                "dur": 1e3 * event.duration_ms,
                "args": _about(event, result),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _about(event: TraceEvent, result: ProfileResult) -> dict[str, Any]:
    if event.operator is None:
        return {}
    row = result.operators[event.operator]
    known = {"module": row.module, "source": row.source, "bound by": row.bound_by}
    return {name: text for name, text in known.items() if text}


def write_chrome(result: ProfileResult, path: Path) -> None:
    """Write the timeline to a file.

    Raises:
        BadInputError: It cannot be written.
    """
    try:
        write_atomic(path, json.dumps(chrome(result)))
    except OSError as error:
        raise BadInputError(f"--trace: cannot write {path}: {error.strerror or error}") from None
