"""Which of the verified trials wins."""

import math
from collections.abc import Sequence

from suanli.base.trial import Trial

TIE = 0.02  # two plans this close cannot be told apart by the search's short timings
_OVERLAP_TIE = 0.05  # and two whose 95 % intervals overlap not up to this


def sound(trial: Trial) -> bool:
    """Whether a trial may win: verified, with a time that makes sense."""
    rate = trial.samples_per_s
    return (
        trial.status == "verified"
        and trial.step_ms is not None
        and rate is not None
        and 0 < rate < math.inf
        and 0 < trial.step_ms.p50 < math.inf
    )


def ranked(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Verified trials, the winner first, the others by falling samples/s.

    The winner is the fastest, or among those that tie with it (within 2 %, or within 5 % with
    overlapping intervals) the simplest: floating point before quantised, few changes before many.
    A tie never makes the winner slower than the fastest baseline.
    """
    verified = sorted((t for t in trials if sound(t)), key=lambda t: (-_rate(t), t.plan.key))
    if not verified:
        return ()
    fastest = verified[0]
    least = max((_rate(t) for t in verified if t.baseline), default=0.0)
    tied = [t for t in verified if _rate(t) >= least and _ties(t, fastest)]
    winner = min(tied, key=_complexity)
    return (winner, *(t for t in verified if t is not winner))


def _rate(trial: Trial) -> float:
    return trial.samples_per_s or 0.0


def _ties(trial: Trial, fastest: Trial) -> bool:
    gap = 1 - _rate(trial) / _rate(fastest)
    if gap <= TIE:
        return True
    assert trial.step_ms is not None
    assert fastest.step_ms is not None
    overlap = trial.step_ms.lo95 <= fastest.step_ms.hi95
    return gap <= _OVERLAP_TIE and overlap


def _complexity(trial: Trial) -> tuple[float, ...]:
    plan = trial.plan
    return (
        plan.quantized,
        plan.streams > 1,
        plan.sub_batch > 0,
        len(plan.options),
        len(plan.float_operators),
        -_rate(trial),
    )
