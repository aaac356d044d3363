"""Time that a step spends on neither operators nor data: values read back, calls too small."""

from dataclasses import dataclass

from suanli.profiling.joining import plain_name
from suanli.profiling.recording import Node, Recording
from suanli.profiling.rows import TINY_MS

_READS = {"item", "_local_scalar_dense", "is_nonzero"}
# What stands around a value that is read back: taking it out of its tensor.
_AROUND = {
    "select",
    "unbind",
    "view",
    "squeeze",
    "unsqueeze",
    "detach",
    "slice",
    "as_strided",
    "to",
}
# Between two such calls, with no other in between, the program deals with what it read; more than
# this is work of its own.
_NEAR_MS = 5.0


@dataclass(frozen=True, kw_only=True)
class ReadBacks:
    """Values that were taken out of tensors in a step.

    Attributes:
        count: How many.
        ms: What they cost: their calls, the calls that pick them, the program around each; on a
            device the time for which it had nothing to do because of them.
    """

    count: int
    ms: float


def read_backs(recording: Recording) -> ReadBacks:
    """Find values that are read back while the step goes on.

    The last one of a step is left out: to look at the loss once costs nothing that matters.
    """
    calls = [root for root in recording.roots if root.part != "data"]
    runs: list[list[Node]] = [[]]
    for call in calls:
        if not _is_around(call) or (runs[-1] and call.start_ms - runs[-1][-1].end_ms > _NEAR_MS):
            runs.append([])
        if _is_around(call):
            runs[-1].append(call)
    found = [(run, sum(_reads(call) for call in run)) for run in runs]
    found = [(run, count) for run, count in found if count]
    total = sum(count for _, count in found)
    if total <= 1:
        return ReadBacks(count=total, ms=0.0)
    if recording.device:
        ms = sum(_starved(run[-1].end_ms, recording) for run, _ in found[:-1])
    else:
        ms = sum(run[-1].end_ms - run[0].start_ms for run, _ in found)
    return ReadBacks(count=total, ms=ms)


def _is_around(call: Node) -> bool:
    return plain_name(call.name) in _READS | _AROUND


def _reads(call: Node) -> int:
    return int(plain_name(call.name) in _READS)


def _starved(at_ms: float, recording: Recording) -> float:
    """Milliseconds until the device has something to do again."""
    later = [run.start_ms for run in recording.device if run.start_ms >= at_ms]
    return min(later) - at_ms if later else 0.0


@dataclass(frozen=True, kw_only=True)
class TinyCalls:
    """Calls so small that calling them is most of their time.

    Attributes:
        count: How many.
        ms: Their time together with what lies between operators.
    """

    count: int
    ms: float


def tiny_calls(recording: Recording, idle_ms: float) -> TinyCalls:
    """Count outermost calls that compute next to nothing."""
    small = [r for r in recording.roots if r.part != "data" and r.ms < TINY_MS]
    return TinyCalls(count=len(small), ms=sum(r.ms for r in small) + idle_ms)
