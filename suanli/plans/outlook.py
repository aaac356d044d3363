"""What the trials so far say about the plans not yet tried: what each will take and gain."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from suanli.base.plan import Plan
from suanli.base.trial import Trial
from suanli.plans.space import Candidate, decisions

TRIAL_S = 4.0  # starting a process, importing, checking and timing, beside the build

# Standard deviations of ln(measured / expected), set by hand: a promise is taken to be off by a
# factor of 1.65 one time in three, one corrected by a trial of the same backend by 1.35, and the
# effect of one changed decision by 1.1.
_SIGMA_PROMISE = 0.5
_SIGMA_BACKEND = 0.3
_SIGMA_CHANGE = 0.1


class Change(NamedTuple):
    """One decision in which two plans of a family differ."""

    name: str
    before: object
    after: object


class Measured(NamedTuple):
    """A candidate with the median step of its trial."""

    candidate: Candidate
    step_ms: float


def only_change(before: Plan, after: Plan) -> Change | None:
    """The decision in which two plans of a family differ; None if there is none or several."""
    old, new = decisions(before), decisions(after)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if len(differing) != 1:
        return None
    name = differing[0]
    return Change(name, old.get(name), new.get(name))


def expected_gain(best_ms: float, expected_ms: float, sigma: float) -> float:
    """Milliseconds by which a plan is expected to beat the best, counting "not at all" as 0.

    The step is taken as lognormal with median `expected_ms`: with d = ln(best/expected)/sigma the
    expectation of max(best - step, 0) is best F(d) - expected exp(sigma²/2) F(d - sigma), where F
    is the normal distribution function (the partial expectation of a lognormal variable). Choosing
    by it is known as expected improvement: Jones, Schonlau and Welch, "Efficient global
    optimization of expensive black-box functions", 1998.
    """
    d = math.log(best_ms / expected_ms) / sigma
    mean = expected_ms * math.exp(sigma**2 / 2)
    return max(0.0, best_ms * _normal(d) - mean * _normal(d - sigma))


class Outlook:
    """Expectations, corrected by what was measured on this machine.

    Three things are learned: how much longer than promised each backend's trials take, how much
    slower than promised its plans are, and what a changed decision (such as two streams for one)
    did to the step in the families where it was tried.
    """

    def __init__(self, steps_per_trial: float = 0.0) -> None:
        """Start without knowledge.

        Args:
            steps_per_trial: Steps that a trial computes while it is checked, so that a trial of a
                slow plan takes long for that and not because its build is slow.
        """
        self._steps_s = steps_per_trial / 1e3
        self._duration: defaultdict[str, list[float]] = defaultdict(list)
        self._slowness: defaultdict[str, list[float]] = defaultdict(list)
        self._first_slowness = 0.0
        self._effects: defaultdict[Change, list[float]] = defaultdict(list)
        self._families: defaultdict[str, list[Measured]] = defaultdict(list)

    def learn(self, candidate: Candidate, trial: Trial, seconds: float) -> None:
        """Take in a finished trial that took `seconds` of wall time."""
        step_ms = trial.step_ms.p50 if trial.step_ms is not None else math.nan
        if not 0 < step_ms < math.inf:
            return  # a trial that did not get so far says nothing about the time of a whole one
        if seconds > 0:
            expected = candidate.build_s + TRIAL_S
            building = max(seconds - self._steps_s * step_ms, seconds / 4)
            self._duration[candidate.plan.backend].append(math.log(building / expected))
        if candidate.coarse or candidate.baseline:
            slowness = math.log(step_ms / candidate.expected_ms)
            if not self._slowness:
                self._first_slowness = slowness
            self._slowness[candidate.plan.backend].append(slowness)
        relatives = self._families[candidate.family]
        for relative in relatives:
            change = only_change(relative.candidate.plan, candidate.plan)
            if change is not None:
                effect = math.log(step_ms / relative.step_ms)
                self._effects[change].append(effect)
                self._effects[Change(change.name, change.after, change.before)].append(-effect)
        relatives.append(Measured(candidate, step_ms))

    def seconds(self, candidate: Candidate) -> float:
        """Seconds that a trial of the candidate is expected to take."""
        known = self._duration.get(candidate.plan.backend)
        if not known:
            known = [_mean(values) for values in self._duration.values()]
        building = (candidate.build_s + TRIAL_S) * math.exp(_mean(known))
        return building + self._steps_s * self.step(candidate)[0]

    def step(self, candidate: Candidate) -> tuple[float, float]:
        """Expected step of a plan in a family not yet measured.

        Returns:
            Median in milliseconds, and the standard deviation of its logarithm.
        """
        known = self._slowness.get(candidate.plan.backend)
        slowness = _mean(known) if known else self._first_slowness
        sigma = _SIGMA_BACKEND if known else _SIGMA_PROMISE
        return candidate.expected_ms * math.exp(slowness), sigma

    def step_after(self, parent: Measured, candidate: Candidate) -> tuple[float, float]:
        """Expected step of a plan that differs from a measured one in one decision.

        Returns:
            Median in milliseconds, and the standard deviation of its logarithm.
        """
        change = only_change(parent.candidate.plan, candidate.plan)
        effects = self._effects.get(change) if change else None
        if effects:
            ratio = math.exp(_mean(effects))
        else:
            ratio = candidate.expected_ms / parent.candidate.expected_ms
        return parent.step_ms * ratio, _SIGMA_CHANGE

    def siblings(self, backend: str) -> list[Measured]:
        """Measured plans of a backend, the fastest first."""
        found = [
            measured
            for relatives in self._families.values()
            for measured in relatives
            if measured.candidate.plan.backend == backend
        ]
        return sorted(found, key=lambda measured: measured.step_ms)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
