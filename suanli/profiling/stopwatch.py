"""Times steps and their parts without looking inside, and notes what disturbed them."""

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Part = Literal["data", "forward", "backward", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer")
Mark = Callable[[Part], None]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step as it was timed.

    Attributes:
        ms: The whole step.
        parts: Milliseconds by part, in the order of `PARTS`; they add up to `ms`.
        collected_ms: Python's garbage collection in it.
        switched: How often the system took the processor away.
        faults: Pages of memory that were brought in anew.
    """

    ms: float
    parts: dict[Part, float]
    collected_ms: float = 0.0
    switched: int = 0
    faults: int = 0


class Stopwatch:
    """Splits the time of a step among its parts.

    The parts follow each other; a part may come several times in a step, as the passes of
    micro-batches do. Reading the clock costs about 0.1 us a mark.
    """

    def __init__(self) -> None:
        self.parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "data"
        self._since = time.perf_counter()

    def mark(self, part: Part) -> None:
        """Another part begins."""
        now = time.perf_counter()
        self.parts[self._part] += 1e3 * (now - self._since)
        self._part, self._since = part, now

    def stop(self) -> None:
        """The step is over."""
        self.mark("data")


@dataclass
class _Collections:
    """Milliseconds that Python's collector took since the last look."""

    ms: float = 0.0
    _since: float = field(default=0.0)

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._since = time.perf_counter()
        else:
            self.ms += 1e3 * (time.perf_counter() - self._since)


def time_steps(
    step: Callable[[Mark], object],
    *,
    steps: int,
    max_seconds: float,
    first: Part,
    sync: Callable[[], object] | None = None,
    go_on: Callable[[bool], bool] = bool,
) -> list[StepTime]:
    """Time steps one after the other, as they come: no profiler, the collector left on.

    Args:
        step: Runs one step and tells when a part begins.
        steps: How many; fewer where time is out, but at least three.
        max_seconds: Time for them.
        first: The part that a step begins with.
        sync: Waits until the device is done; its time counts as part of the step.
        go_on: Told whether this process would run another step; says whether all do.
    """
    found: list[StepTime] = []
    end = time.perf_counter() + max_seconds
    with _watched_collector() as collected:
        while go_on(len(found) < steps and (len(found) < 3 or time.perf_counter() < end)):
            collected.ms = 0.0
            before = resource.getrusage(resource.RUSAGE_SELF)
            watch = Stopwatch()
            watch.mark(first)
            step(watch.mark)
            if sync is not None:
                sync()
            watch.stop()
            after = resource.getrusage(resource.RUSAGE_SELF)
            found.append(
                StepTime(
                    ms=sum(watch.parts.values()),
                    parts=watch.parts,
                    collected_ms=collected.ms,
                    switched=after.ru_nivcsw - before.ru_nivcsw,
                    faults=after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
                )
            )
    return found


@contextmanager
def _watched_collector() -> Iterator[_Collections]:
    watch = _Collections()
    gc.callbacks.append(watch)
    try:
        yield watch
    finally:
        gc.callbacks.remove(watch)


def typical_parts(steps: list[StepTime]) -> dict[Part, float]:
    """Milliseconds by part of the usual step: the median of each, brought to the median step."""
    parts = {part: median(s.parts[part] for s in steps) for part in PARTS}
    whole, added = median(s.ms for s in steps), sum(parts.values())
    return {part: ms * whole / added if added else 0.0 for part, ms in parts.items()}
