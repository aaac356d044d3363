"""The only clock: how long one call takes, and how two ways of calling compare.

Medians throughout, with distribution-free intervals from order statistics: timings on a shared
machine have long tails, and neither a mean nor a normal interval describes them. One run of
`measure` sees one state of the machine (clock, neighbours, memory placement), so two figures of it
are only roughly comparable; what is published as a speed-up comes from `race`.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median

from suanli.base.timing import Estimate, Timing

_NS_PER_MS = 1e6
# Reading the clock costs this part of a sample at most.
_CLOCK_SHARE = 1e-3
# Timing goes on until the interval is this narrow (width over median), or time is out.
_NARROW = 0.02
_LEAST_SAMPLES = 10
_MOST_SAMPLES = 20_000
# Warm-up ends when a window of calls is no longer faster than the best before it by this part.
_STEADY = 0.02
_WINDOW = 5
_LONG_CALL_TURNS = 3.0
_LEAST_MS = 1e-6

Call = Callable[[], object]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Median and its interval between two order statistics.

    The interval runs from the r-th smallest to the r-th largest value, with the largest r for
    which P(Binomial(n, 1/2) < r) <= (1 - confidence) / 2; it covers the median of any continuous
    distribution (David and Nagaraja, Order Statistics, section 7.1). Under 6 values no such r
    exists at 95 %; then the interval is the range, which covers with 1 - 2**(1 - n).

    Args:
        values: At least one independent value.
        confidence: Coverage.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values to estimate from")
    ordered = sorted(values)
    rank = _rank(len(ordered), (1 - confidence) / 2)
    return Estimate(p50=median(ordered), lo95=ordered[rank - 1], hi95=ordered[-rank])


@cache
def _rank(n: int, tail: float) -> int:
    """Largest r >= 1 with P(Binomial(n, 1/2) < r) <= tail, or 1."""
    if n > 1000:  # the normal approximation, rounded outwards
        z = 1.96 if abs(tail - 0.025) < 1e-9 else math.sqrt(-2 * math.log(tail))
        return max(1, math.floor(n / 2 - z / 2 * math.sqrt(n)))
    below, rank = 0.0, 0
    while rank <= n // 2:
        below += math.comb(n, rank) / 2**n
        if below > tail:
            break
        rank += 1
    return max(1, rank)


def timed_calls(fn: Call, n: int, *, settle: int = 0, sync: Call | None = None) -> list[float]:
    """Milliseconds of each of `n` calls, one clock reading around each.

    Args:
        fn: What to time.
        n: Calls to time.
        settle: Calls made before, untimed, so that caches hold this side's data again.
        sync: Waits until the device is done; its time counts as part of the call.
    """
    for _ in range(settle):
        _call(fn, sync)
    with _no_collection():
        return [_sample_ms(fn, 1, sync) for _ in range(n)]


def measure(
    fn: Call,
    *,
    batch: int = 1,
    min_seconds: float = 0.3,
    max_seconds: float = 2.0,
    sync: Call | None = None,
    warmup: int = 3,
) -> Timing:
    """Time one call: warm up until steady, then sample until the interval is narrow.

    A sample is one call, or the mean of as many calls as make reading the clock cost under 0.1 %.
    Garbage collection is off during samples. Sampling ends when the interval is within 2 % and
    `min_seconds` have passed, or at `max_seconds`. A call that takes longer than `max_seconds` is
    made once and its time returned; `repeats` says so.

    Args:
        fn: What to time.
        batch: Samples per call, for the rate.
        min_seconds: Least time spent on samples.
        max_seconds: Most time spent on warm-up and samples together, but for one call's length.
        sync: Waits until the device is done; its time counts as part of the call.
        warmup: Least calls before the first sample.

    Returns:
        The timing; the interval of `step_ms` is `median_interval`'s.
    """
    begin = time.perf_counter()
    if sync is not None:
        sync()
    call_ms = _warm_up(fn, sync, warmup, budget_s=max_seconds / 4, cap_s=max_seconds)
    inner = max(1, math.ceil(_clock_ns() / _CLOCK_SHARE / (call_ms * _NS_PER_MS)))
    samples: list[float] = []
    first_sample = time.perf_counter()
    with _no_collection():
        while not _enough(samples, begin, first_sample, min_seconds, max_seconds):
            samples.append(_sample_ms(fn, inner, sync))
    repeats = len(samples) * inner
    if not samples:
        samples, repeats = [call_ms], 1
    step = median_interval(samples)
    return Timing(step_ms=step, batch=batch, samples_per_s=batch / step.p50 * 1e3, repeats=repeats)


def _enough(
    samples: list[float], begin: float, first_sample: float, min_seconds: float, max_seconds: float
) -> bool:
    now = time.perf_counter()
    n = len(samples)
    if now - begin >= max_seconds or n >= _MOST_SAMPLES:
        return True
    if n < _LEAST_SAMPLES or now - first_sample < min_seconds:
        return False
    # Sorting at every sample would itself take processor time from the thing measured.
    return n % _LEAST_SAMPLES == 0 and median_interval(samples).relative_width <= _NARROW


def _warm_up(fn: Call, sync: Call | None, least: int, *, budget_s: float, cap_s: float) -> float:
    """Call until windows of calls stop becoming faster; the last window's median in ms."""
    begin = time.perf_counter()
    window = [_sample_ms(fn, 1, sync)]
    best, calls = math.inf, 1
    while (spent := time.perf_counter() - begin) < cap_s:
        if calls >= least and spent >= budget_s:
            break
        if len(window) == _WINDOW:
            if calls >= least and median(window) > best * (1 - _STEADY):
                break
            best = min(best, median(window))
            window = []
        window.append(_sample_ms(fn, 1, sync))
        calls += 1
    return max(median(window), _LEAST_MS)


def _sample_ms(fn: Call, inner: int, sync: Call | None) -> float:
    """Milliseconds per call over `inner` calls."""
    if sync is None:
        start = time.perf_counter_ns()
        for _ in range(inner):
            fn()
        return (time.perf_counter_ns() - start) / (inner * _NS_PER_MS)
    start = time.perf_counter_ns()
    for _ in range(inner):
        fn()
        sync()
    return (time.perf_counter_ns() - start) / (inner * _NS_PER_MS)


def _call(fn: Call, sync: Call | None) -> None:
    fn()
    if sync is not None:
        sync()


@cache
def _clock_ns() -> float:
    """What one reading of the clock may add: its step or its cost, the larger, in nanoseconds."""
    steps = []
    for _ in range(200):
        start = time.perf_counter_ns()
        while (now := time.perf_counter_ns()) == start:
            pass
        steps.append(now - start)
    return float(median(steps))


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One side of a race, usually in a worker of its own.

    Attributes:
        run: Makes that many timed calls and gives the milliseconds of each, as `timed_calls` does.
        pause: Stops the side's threads, so that they do not spin while the other side runs.
        resume: Lets them run again.
    """

    run: Callable[[int], Sequence[float]]
    pause: Callable[[], None] = _nothing
    resume: Callable[[], None] = _nothing

    @classmethod
    def here(cls, fn: Call, *, sync: Call | None = None) -> "Contender":
        """A call in this process; see `timed_calls` for `fn` and `sync`."""
        return cls(run=lambda calls: timed_calls(fn, calls, settle=1, sync=sync))


@dataclass(frozen=True, kw_only=True)
class RaceResult:
    """Two sides timed in alternation.

    Attributes:
        a_ms: Milliseconds per call of side A.
        b_ms: The same of side B.
        ratio: A's time over B's; above 1, B is the faster.
        pairs: Adjacent turns of A and B that were compared.
        load_average: The machine's one-minute load before and after; None where it is not known.
        seconds_spent: Wall time of the race.
    """

    a_ms: Estimate
    b_ms: Estimate
    ratio: Estimate
    pairs: int
    load_average: tuple[float, float] | None
    seconds_spent: float


def race(
    a: Contender,
    b: Contender,
    *,
    blocks: tuple[int, int] = (4, 24),
    turn_seconds: float = 0.15,
    max_seconds: float = 20.0,
    width: float = 0.04,
) -> RaceResult:
    """Compare two sides in blocks A B B A, so that a drift of the machine cancels.

    Each block gives two pairs of adjacent turns, (A, B) and (B, A). With a_i and b_i the median
    call of the turns of pair i, the ratio is exp(median of log(a_i / b_i)), and its interval the
    distribution-free one of that median (`median_interval`), carried through exp. A drift adds as
    much to one pair of a block as it takes from the other. The interval of a side's own time is
    that of the median of its turns, since calls of one turn are not independent. The idle side is
    paused.

    Racing ends when the ratio's interval is as narrow as `width` after at least `blocks[0]` blocks,
    and after `blocks[1]` blocks or `max_seconds` at the latest. It is looked at only when the
    number of blocks has doubled: ending at the first lucky look would make the interval too narrow.
    When time is out before 3 blocks (6 pairs), the interval is the range of the pairs.

    Args:
        a: One side.
        b: The other side.
        blocks: Fewest and most blocks.
        turn_seconds: Length of one turn; at least one call is made, and one more to settle
            unless a call is several times as long as a turn.
        max_seconds: Wall time, but for one block's length.
        width: Width of the ratio's interval over the ratio.

    Raises:
        ValueError: A side returned no time, or one that is not positive.
    """
    begin = time.perf_counter()
    load_before = _load()
    sides = {"a": _Side(a, turn_seconds), "b": _Side(b, turn_seconds)}
    a.pause()
    b.pause()
    turns: dict[str, list[float]] = {"a": [], "b": []}
    done, look = 0, blocks[0]
    while True:
        for name in "abba" if done % 2 == 0 else "baab":
            turns[name].append(sides[name].turn())
        done += 1
        logs = [math.log(x / y) for x, y in zip(turns["a"], turns["b"], strict=True)]
        if done >= blocks[1] or time.perf_counter() - begin >= max_seconds:
            break
        if done == look:
            if _exp(median_interval(logs)).relative_width <= width:
                break
            look *= 2
    load_after = _load()
    known = load_before is not None and load_after is not None
    return RaceResult(
        a_ms=median_interval(turns["a"]),
        b_ms=median_interval(turns["b"]),
        ratio=_exp(median_interval(logs)),
        pairs=len(logs),
        load_average=(load_before or 0.0, load_after or 0.0) if known else None,
        seconds_spent=time.perf_counter() - begin,
    )


class _Side:
    """Gives a contender its turns; how many calls make one is learnt from the calls themselves."""

    def __init__(self, contender: Contender, turn_seconds: float) -> None:
        self._contender = contender
        self._turn_ms = turn_seconds * 1e3
        self._calls = 1
        self._settling = 1
        self._known = False

    def turn(self) -> float:
        """Run one turn; the median call in ms, without a first one that settles."""
        self._contender.resume()
        try:
            if not self._known:
                self._learn()
            times = self._run(self._calls + self._settling)[self._settling :]
        finally:
            self._contender.pause()
        return median(times)

    def _learn(self) -> None:
        """Warm up, and choose the calls per turn."""
        call_ms = self._run(1)[0]
        if call_ms >= self._turn_ms:  # it may have compiled something; the second call tells
            call_ms = self._run(1)[0]
        if call_ms < self._turn_ms:
            calls = max(2, min(50, int(self._turn_ms / 2 / call_ms)))
            call_ms = median(self._run(calls))
        self._calls = max(1, min(2000, int(self._turn_ms / call_ms)))
        # caches fill in a small part of so long a call
        self._settling = 0 if call_ms > _LONG_CALL_TURNS * self._turn_ms else 1
        self._known = True

    def _run(self, n: int) -> list[float]:
        times = list(self._contender.run(n))
        if len(times) != n or any(not t > 0 or math.isinf(t) for t in times):
            raise ValueError(f"a side was asked for {n} positive times and gave {times[:3]}")
        return times


def _exp(logs: Estimate) -> Estimate:
    return Estimate(p50=math.exp(logs.p50), lo95=math.exp(logs.lo95), hi95=math.exp(logs.hi95))


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
