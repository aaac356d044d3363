"""How the learning rate goes over a run."""

import math

from suanli.training.recipe import Recipe

_CYCLE_WARM_UP = 0.25  # share of a cycle in which the rate rises; airbench94 uses 0.23
_COSINE_WARM_UP, _COSINE_END = 0.05, 0.1


def rate(recipe: Recipe, done: float, group: str = "") -> float:
    """What the peak rate of a parameter group is multiplied with.

    Args:
        recipe: Its own `rate` has the word, else its settings' schedule.
        done: Share of the run that is over, 0 to 1.
        group: Name of the parameter group.
    """
    if recipe.rate is not None:
        return recipe.rate(done, group)
    schedule = recipe.settings.schedule
    if schedule == "constant":
        return 1.0
    if schedule == "one_cycle":
        if done < _CYCLE_WARM_UP:
            return 0.1 + 0.9 * done / _CYCLE_WARM_UP
        return (1.0 - done) / (1.0 - _CYCLE_WARM_UP)
    if done < _COSINE_WARM_UP:
        return (1 + 19 * done / _COSINE_WARM_UP) / 20  # the first step is a small one, not none
    over = (done - _COSINE_WARM_UP) / (1.0 - _COSINE_WARM_UP)
    return _COSINE_END + (1.0 - _COSINE_END) * 0.5 * (1.0 + math.cos(math.pi * over))


def triangle(done: float, *, start: float = 0.2, peak: float = 0.23, end: float = 0.07) -> float:
    """Up in a straight line to 1 at `peak`, then down in one; the defaults are airbench94's.

    Args:
        done: Share of the run, 0 to 1.
        start: Value at 0.
        peak: Share at which the value is 1; 0 begins there.
        end: Value at 1.
    """
    if done < peak:
        return start + (1.0 - start) * done / peak
    return 1.0 - (1.0 - end) * (done - peak) / (1.0 - peak)
