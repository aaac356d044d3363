"""Runs a loop on several cores at once and reads the common rate off the time stamps."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Units per second of all threads together.

    Attributes:
        best: In the best stretch of time. What else runs on the machine only takes away, so the
            best stretch is the one closest to what the hardware can do.
        spread: (third quartile - first quartile) / median over all stretches.
        stretches: How many there were.
    """

    best: float
    spread: float
    stretches: int


def run_pinned(work: Callable[[int], list[float]], cpus: Sequence[int]) -> list[list[float]]:
    """Call `work(i)` in one thread per processor, all at once, each kept on its processor.

    Args:
        work: Gives the time stamps of its blocks. It must let other threads run (a C call does).
        cpus: Numbers of the processors; where the system cannot pin, only their count matters.

    Returns:
        The stamps of each thread.

    Raises:
        Exception: Whatever `work` raised first.
    """
    results: list[list[float]] = [[] for _ in cpus]
    errors: list[BaseException] = []
    together = threading.Barrier(len(cpus))

    def run(i: int) -> None:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {cpus[i]})  # 0 is this thread, not the process
            together.wait()
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(cpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def summed_rates(stamps: list[list[float]], units_per_block: float, stretch_s: float) -> Rates:
    """Each core at its own best, summed: for work that cores do not share anything for.

    A core that another program takes for a moment loses that moment only, so this figure holds on
    a busy machine, where a time in which all cores are free may never come.

    Args:
        stamps: For each thread the start and the time after each block, in seconds.
        units_per_block: Work of a block.
        stretch_s: Least length over which a rate is read.
    """
    best, spread, stretches = 0.0, 0.0, 0
    for times in map(np.asarray, stamps):
        block = float(np.median(np.diff(times)))
        count = min(max(1, round(stretch_s / block)), len(times) - 1)
        rates = count * units_per_block / (times[count:] - times[:-count])
        best += float(np.max(rates))
        spread = max(spread, _spread(rates))
        stretches += len(rates)
    return Rates(best=best, spread=spread, stretches=stretches)


def common_rates(stamps: list[list[float]], units_per_block: float, stretch_s: float) -> Rates:
    """Rates over stretches of time in which all threads were running.

    Each thread's work is a line over its time stamps; the sum of the lines over a stretch, divided
    by its length, is the rate of all cores at once. Threads that start late or are interrupted
    thus never inflate it. For what cores share, such as memory.

    Args:
        stamps: For each thread the start and the time after each block, in seconds on one clock.
        units_per_block: Work of a block.
        stretch_s: Length of a stretch; lengthened to two blocks.
    """
    start = max(times[0] for times in stamps)
    end = min(times[-1] for times in stamps)
    block = max(float(np.median(np.diff(times))) for times in stamps)
    # A stretch inside one block would read a rate between two stamps that nobody measured.
    count = int((end - start) / max(stretch_s, 2 * block))
    if count < 1:
        whole = max(times[-1] for times in stamps) - min(times[0] for times in stamps)
        blocks = sum(len(times) - 1 for times in stamps)
        return Rates(best=blocks * units_per_block / whole, spread=0.0, stretches=1)
    edges = np.linspace(start, end, count + 1)
    done = sum(np.interp(edges, times, np.arange(len(times))) for times in stamps)
    rates = np.diff(done) * units_per_block / np.diff(edges)
    return Rates(best=float(np.max(rates)), spread=_spread(rates), stretches=count)


def _spread(rates: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    first, median, third = np.percentile(rates, [25, 50, 75])
    return float((third - first) / median) if median else 0.0
