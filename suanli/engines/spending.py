"""How the seconds of a budget are shared out, and where they went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_RESERVE = 0.3  # of the budget, kept back for the fresh process, the acceptance and the race
_MOST_RESERVE_S = 75.0
_RACE_SHARE = 0.6  # of the reserve
_LEAST_RACE_S = 6.0  # fewer seconds give intervals that say nothing
_PROCESSES = 4  # started after the search: the engine's, two rivals', and the engine opened at last
_MOST_SHARE = 0.6  # of what is left, that may be kept back; the search gets the rest
_OVERRUN = 1.05  # times the budget, from which on it is said


class Spending:
    """The clock of one search and the seconds of its parts.

    Capture, reference, the fresh process and a race take what they take; only the search and the
    length of the race can give way.
    """

    def __init__(self, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            budget_s: Seconds for everything.
            clock: Seconds, for tests.
        """
        self.budget_s = budget_s
        self.process_s = 0.0
        """Seconds from the start of a worker to its first answer, as measured in this search."""
        self._clock, self._started = clock, clock()
        self._parts: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left; negative when it is overrun."""
        return self.budget_s - self.spent_s

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's seconds to a part; blocks of one name add up."""
        started = self._clock()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + self._clock() - started

    def search_s(self) -> float:
        """Seconds for the search: what is left, less what has to come after it."""
        floor = min(self._after_search_s(), _MOST_SHARE * self.left_s)
        return max(1.0, self.left_s - max(self._reserve_s(), floor))

    def race_s(self) -> float:
        """Seconds for the races: their share of the reserve, less where others took more."""
        to_come = (_PROCESSES - 1) * self.process_s
        return max(_LEAST_RACE_S, min(_RACE_SHARE * self._reserve_s(), self.left_s - to_come))

    def overrun(self) -> str:
        """What is said when the budget did not do; "" when it did."""
        if self.spent_s <= _OVERRUN * self.budget_s:
            return ""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self._parts.items())
        return f"budget {self.budget_s:.0f} s, took {self.spent_s:.0f} s: {parts}"

    def _reserve_s(self) -> float:
        return min(_RESERVE * self.budget_s, _MOST_RESERVE_S)

    def _after_search_s(self) -> float:
        return _PROCESSES * self.process_s + _LEAST_RACE_S
