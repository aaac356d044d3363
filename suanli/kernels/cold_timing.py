"""Timing of GPU kernels: cold caches, device time, and a guard against a clock that drifts."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from suanli.base.timing import Estimate
from suanli.devices import Device
from suanli.measure.timing import Contender, RaceResult, median_interval, race

Call = Callable[[], object]
_DRIFT = 0.03
_ATTEMPTS = 3
_LEAST = 10


@dataclass(frozen=True, kw_only=True)
class ColdTimer:
    """Times calls on a device by its own events, with the cache flushed before each.

    Attributes:
        device: Where the calls run.
        flush: Overwrites more memory than the last-level cache holds. It also keeps the device
            busy while the host launches what is timed, so that the host's time does not count.
        yardstick: Work that never changes; where its time moved, the clock did.
        seconds: Spent on one measurement, about.
    """

    device: Device
    flush: Call
    yardstick: Call
    seconds: float = 0.2

    def calls(self, call: Call, count: int) -> list[float]:
        """Milliseconds of device time of each of `count` calls, cold."""
        marks = []
        for _ in range(count):
            self.flush()
            before, after = self.device.event(), self.device.event()
            before.record()
            call()
            after.record()
            marks.append((before, after))
        self.device.synchronize()
        return [max(after.seconds_since(before) * 1e3, 1e-6) for before, after in marks]

    def measure(self, call: Call) -> tuple[Estimate, bool]:
        """Median time in ms, and whether the clock stood still while it was taken.

        The first calls compile and warm up, and do not count. The yardstick is timed before and
        after; where its two medians differ by more than 3 %, the measurement is made again, three
        times at most.
        """
        warm = self.calls(call, 3)
        count = max(_LEAST, min(200, int(self.seconds * 1e3 / max(median(warm[1:]), 1e-3))))
        steady = False
        samples: list[float] = []
        for _ in range(_ATTEMPTS):
            before = median(self.calls(self.yardstick, 5))
            samples = self.calls(call, count)
            after = median(self.calls(self.yardstick, 5))
            steady = abs(after / before - 1) <= _DRIFT
            if steady:
                break
        return median_interval(samples), steady

    def race(self, rival: Call, winner: Call, *, max_seconds: float = 10.0) -> RaceResult:
        """The two in alternating blocks; `ratio` is the rival's time over the winner's."""
        return race(
            Contender(run=lambda n: self.calls(rival, n)),
            Contender(run=lambda n: self.calls(winner, n)),
            turn_seconds=self.seconds / 4,
            max_seconds=max_seconds,
        )
