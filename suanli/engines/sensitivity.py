"""Which operators a lower precision hurts most, found with few measurements.

Only the order matters, so operators are measured in groups: the group whose return to the higher
precision helps most is halved until single operators are left. One bad operator among n is found
with about 2 log2(n) measurements instead of n.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PutBack:
    """What was put back into the higher precision.

    Attributes:
        keep: Operators to keep in the higher precision, the most harmful first.
        before: Harm with nothing kept.
        after: Harm with `keep` kept; equal to `before` where nothing was.
        measured: How many variants were measured.
        enough: Whether `after` is within the wish.
    """

    keep: tuple[str, ...]
    before: float
    after: float
    measured: int
    enough: bool


def put_back(
    names: Sequence[str],
    harm: Callable[[frozenset[str]], float],
    *,
    wish: float,
    seconds: float,
    most: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> PutBack:
    """Put the worst operators back until the harm is within the wish.

    Args:
        names: The operators in lower precision, in execution order (neighbours are halved
            together).
        harm: Operators kept in the higher precision -> harm; larger is worse, NaN counts as
            infinite.
        wish: Harm that is low enough.
        seconds: Time after which no further variant is measured.
        most: Largest number of operators put back; 0 for half of them.
        clock: Seconds, for tests.
    """
    probe = _Probe(harm, clock() + seconds, clock)
    before = probe(frozenset())
    keep: list[str] = []
    after = before
    order = itertools.count()  # ties go to the group measured first
    heap: list[tuple[float, int, tuple[str, ...]]] = []
    if before > wish and names:
        heap.append((0.0, next(order), tuple(names)))
    limit = most or max(1, len(names) // 2)
    while heap and after > wish and len(keep) < limit and not probe.late:
        _, _, group = heapq.heappop(heap)
        if len(group) > 1:
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                # what is kept already stays kept, so that only what is left to gain counts
                left = probe(frozenset((*keep, *half)))
                heapq.heappush(heap, (left, next(order), half))
            continue
        keep.append(group[0])
        after = probe(frozenset(keep))
    return PutBack(
        keep=tuple(keep),
        before=before,
        after=after,
        measured=probe.measured,
        enough=after <= wish,
    )


class _Probe:
    """Calls `harm`, remembers what it said, and knows when time is up."""

    def __init__(
        self, harm: Callable[[frozenset[str]], float], deadline: float, clock: Callable[[], float]
    ) -> None:
        self._harm, self._deadline, self._clock = harm, deadline, clock
        self._known: dict[frozenset[str], float] = {}
        self.measured = 0

    @property
    def late(self) -> bool:
        return self._clock() >= self._deadline

    def __call__(self, kept: frozenset[str]) -> float:
        if kept not in self._known:
            value = self._harm(kept)
            self._known[kept] = math.inf if math.isnan(value) else value
            self.measured += 1
        return self._known[kept]
