"""From quantities to places in a picture, and the figures that stand at an axis."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


class Scale(Protocol):
    """A quantity along an axis."""

    def __call__(self, value: float) -> float:
        """Where the value lies: 0 at the low end of the axis, 1 at the high end."""

    def ticks(self, most: int) -> list[float]:
        """Round values within the axis, about `most` of them."""


@dataclass(frozen=True)
class Linear:
    """Equal distances are equal differences."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Where the value lies, held within the axis."""
        return _within((value - self.low) / (self.high - self.low))

    def ticks(self, most: int) -> list[float]:
        """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
        rough = (self.high - self.low) / max(1, most)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * s for s in _STEPS if power * s >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Log:
    """Equal distances are equal ratios; every value is above zero."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Where the value lies, held within the axis."""
        span = math.log(self.high / self.low)
        return _within(math.log(max(value, 1e-300) / self.low) / span)

    def ticks(self, most: int) -> list[float]:
        """Powers of ten; where there are few of them, also 2 and 5 times one, or 1 to 9 times."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = range(first, last + 1)
        chosen: list[float] = []
        for parts in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
            found = [_times_ten(part, power) for power in decades for part in parts]
            inside = [v for v in found if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if chosen and len(inside) > most:
                break
            chosen = inside
        return chosen[:: max(1, math.ceil(len(chosen) / max(1, most)))]


def linear_to(values: Iterable[float]) -> Linear:
    """From zero to a little above the largest value."""
    high = max(values, default=0.0)
    return Linear(0.0, high * 1.02 if high > 0 else 1.0)


def linear_around(values: Iterable[float]) -> Linear:
    """From a little below the smallest to a little above the largest value."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-6)
    return Linear(low - room, high + room)


def log_around(values: Iterable[float], least_ratio: float = 2.0) -> Log:
    """A little more than the values take, at least `least_ratio` from end to end.

    Values that are not above zero have no place on it.
    """
    known = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = min(known), max(known)
    room = max(1.12, (high / low) ** 0.06) * max(1.0, math.sqrt(least_ratio * low / high))
    return Log(low / room, high * room)


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))


def _times_ten(part: int, power: int) -> float:
    """Exact, where a product of floats would be off in the last place."""
    return float(f"{part}e{power}")
