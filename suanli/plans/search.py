"""The search: from candidates and a way to evaluate one to the fastest verified plan.

It knows no backend and starts no process. `evaluate(plan, limit_s)` is handed in, and everything
that the search knows of a plan beside its fields is the candidate's expectation and the trials so
far. Baselines come first. Then the candidate with the largest expected gain per second is tried,
again and again: coarse plans, and variations of what is best in each family that is near the best.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from suanli.base.errors import MissingBackendError, SuanliError, TrialFailedError
from suanli.base.events import Event, Listener, ignore
from suanli.base.plan import Plan
from suanli.base.trial import Trial
from suanli.base.units import milliseconds
from suanli.plans.outlook import Measured, Outlook, expected_gain, only_change
from suanli.plans.ranking import ranked, sound
from suanli.plans.space import Candidate
from suanli.plans.store import TrialStore, failed_within

Evaluate = Callable[[Plan, float], Trial]
"""Builds, checks and times one plan in at most so many seconds, and gives its trial."""

NEAR = 1.5  # variations are tried in families whose best is within this factor of the best
HOPELESS = 3.0  # a plan whose sibling was this much slower than the best must be expected near it
_LEAST_GAIN = 0.001  # of the best step: a variation expected to gain less is not worth a trial
_BASELINE_SHARE = 0.5  # an optional baseline that needs more of what is left waits until the end
_PATIENCE = 5.0  # a trial may take this many times what is expected of it
_LEAST_LIMIT_S = 40.0
_OPEN_LIMIT_S = 300.0  # the same for the reference, and where the budget is unlimited
_REFUSED = 0.3  # chance, set by hand, that the acceptance samples refuse a quantised winner
_STRIKES = 2  # families of one backend that fail before the others are left out


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        winner: The best verified trial; None if nothing was verified.
        runner_ups: The other verified trials, the fastest first.
        trials: What was tried, in order, then what was skipped and why.
        interrupted: Whether the person stopped it.
        seconds_spent: Wall time of the search.
        notes: What a person should know.
    """

    winner: Trial | None
    runner_ups: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    interrupted: bool
    seconds_spent: float
    notes: tuple[str, ...] = ()

    @property
    def best_baseline(self) -> Trial | None:
        """The fastest verified baseline."""
        found = [trial for trial in self.trials if trial.baseline and sound(trial)]
        return max(found, key=lambda trial: trial.samples_per_s or 0.0, default=None)


def search(  # noqa: PLR0913
    candidates: Sequence[Candidate],
    evaluate: Evaluate,
    *,
    budget_s: float,
    reserve_s: float = 0.0,
    steps_per_trial: float = 0.0,
    first_plan: float = 0.0,
    lower_bound_ms: Callable[[Plan], float] | None = None,
    store: TrialStore | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_event: Listener = ignore,
) -> SearchResult:
    """Find the fastest verified plan within a budget.

    The first baseline (eager fp32) is always tried, whatever the budget, and with `first_plan` the
    most promising plan too. After them no trial is started that is not expected to end within the
    budget, and none gets more time than is left. A
    candidate is passed over, and said to be, when its lower bound is above the best, when a plan of
    the same backend was three times slower than the best and it is not expected to come near, or
    when two families of its backend have failed. With a budget of infinity only lower bounds are a
    reason, so every other plan is tried.

    A quantised winner may still be refused on samples that the search never sees. So floating-point
    plans are held to the best floating-point plan, and what they gain on it counts by that chance.

    An exception of `evaluate` is a failed trial. KeyboardInterrupt ends the search and keeps what
    was found.

    Args:
        candidates: From `plans.space.candidates`.
        evaluate: `evaluate(plan, limit_s) -> Trial`. The plan in the trial may say more than the
            one asked for, such as operators kept in fp32.
        budget_s: Seconds for everything; infinity tries all there is.
        reserve_s: The part of the budget that is left for confirming the winner.
        steps_per_trial: Steps that a trial computes while it is checked, for its duration.
        first_plan: How many times as long as the first baseline the first plan may take where the
            budget is used up; where that baseline is slow, nothing would be found otherwise.
        lower_bound_ms: Least step time that the ceilings allow a plan.
        store: Earlier trials, taken over without evaluating; new ones are put there.
        clock: Seconds, for tests.
        on_event: Told of each trial before and after.
    """
    work = _Search(candidates, evaluate, budget_s - reserve_s, store, clock)
    work.first_plan, work.lower_bound_ms = first_plan, lower_bound_ms
    work.expect(steps_per_trial)
    work.on_event = on_event
    return work.run()


class _Search:
    """State of one search."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        evaluate: Evaluate,
        budget_s: float,
        store: TrialStore | None,
        clock: Callable[[], float],
    ) -> None:
        self.first_plan = 0.0
        self.lower_bound_ms: Callable[[Plan], float] | None = None
        self.on_event: Listener = ignore
        self._evaluate, self._store, self._clock = evaluate, store, clock
        self._budget_s, self._started = budget_s, clock()
        self._pending = {c.plan.key: c for c in candidates if not c.why_not}
        self._reference = next((c for c in self._pending.values() if c.baseline), None)
        self._tried: list[Trial] = []
        self._skipped = [_skip(c, c.why_not) for c in candidates if c.why_not]
        self._outlook = Outlook()
        self._best_of: dict[str, Measured] = {}
        self._reference_s = 0.0  # what the first baseline took
        self._begun = False  # whether anything but baselines was tried
        self._failed: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._bounds: dict[str, float] = {}

    def expect(self, steps_per_trial: float) -> None:
        """Say how many steps a trial computes."""
        self._outlook = Outlook(steps_per_trial)

    def run(self) -> SearchResult:
        interrupted = False
        try:
            self._resume()
            while (candidate := self._next()) is not None:
                self._try(candidate)
            self._account_for_the_rest()
        except KeyboardInterrupt:
            interrupted = True
        order = ranked(self._tried)
        return SearchResult(
            winner=order[0] if order else None,
            runner_ups=order[1:],
            trials=(*self._tried, *self._skipped),
            interrupted=interrupted,
            seconds_spent=self._spent(),
            notes=tuple(self._notes()),
        )

    # -- what to try next -----------------------------------------------------------------------

    def _next(self) -> Candidate | None:
        reference = self._reference
        if reference is not None and reference.plan.key in self._pending:
            return reference
        waiting = [c for c in self._pending.values() if c.baseline and self._fits(c)]
        for baseline in waiting:
            if self._outlook.seconds(baseline) <= _BASELINE_SHARE * self._left():
                return baseline
        self._pass_over_hopeless()
        offers = [
            (-gain / self._outlook.seconds(c), c.expected_ms, c.plan.key, c)
            for c, gain in self._offers()
            if self._fits(c)
        ]
        if offers:
            return min(offers)[-1]
        return waiting[0] if waiting else None

    def _offers(self) -> Iterator[tuple[Candidate, float]]:
        """Candidates worth a trial, with their expected gain in milliseconds."""
        for candidate in self._pending.values():
            if candidate.baseline:
                continue
            if candidate.coarse or self._exhaustive:
                yield candidate, self._gain(candidate, *self._outlook.step(candidate))
                continue
            parent, rival_ms = self._best_of.get(candidate.family), self._rival_ms(candidate)
            if parent is None or rival_ms is None or parent.step_ms > NEAR * rival_ms:
                continue
            if only_change(parent.candidate.plan, candidate.plan) is None:
                continue
            gain = self._gain(candidate, *self._outlook.step_after(parent, candidate))
            if gain >= _LEAST_GAIN * rival_ms and not self._above_bound(candidate, rival_ms):
                yield candidate, gain

    def _gain(self, candidate: Candidate, expected_ms: float, sigma: float) -> float:
        """Expected gain in milliseconds, over the best and over the best that is sure to stay."""
        rival_ms = self._rival_ms(candidate)
        if rival_ms is None:  # nothing works yet: the fastest first
            return 1 / expected_ms
        best_ms = self._best_ms() or rival_ms
        gain = expected_gain(best_ms, expected_ms, sigma)
        if best_ms < rival_ms:
            gain = max(gain, _REFUSED * expected_gain(rival_ms, expected_ms, sigma))
        return gain

    def _pass_over_hopeless(self) -> None:
        for key, candidate in list(self._pending.items()):
            if candidate.baseline or not (candidate.coarse or self._exhaustive):
                continue
            reason = self._why_hopeless(candidate)
            if reason:
                del self._pending[key]
                self._skipped.append(_skip(candidate, reason))

    def _why_hopeless(self, candidate: Candidate) -> str:
        best_ms, best = self._rival_ms(candidate), self._rival_name(candidate)
        if best_ms is not None and self._above_bound(candidate, best_ms):
            bound_ms = self._bounds[candidate.plan.key]
            return (
                f"its lower bound {milliseconds(bound_ms)} is above {best} {milliseconds(best_ms)}"
            )
        if self._exhaustive:
            return ""
        failures = self._failed[candidate.plan.backend]
        siblings = self._outlook.siblings(candidate.plan.backend)
        if len(failures) >= _STRIKES and not siblings:
            return f"{len(failures)} of its siblings failed, the last: {[*failures.values()][-1]}"
        if best_ms is None or not siblings or siblings[0].step_ms < HOPELESS * best_ms:
            return ""
        expected_ms, _ = self._outlook.step(candidate)
        if expected_ms < NEAR * best_ms:
            return ""
        sibling = siblings[0]
        return (
            f"its sibling {sibling.candidate.plan.title} was {sibling.step_ms / best_ms:.1f}x "
            f"slower than {best}, so about {milliseconds(expected_ms)} is expected"
        )

    def _above_bound(self, candidate: Candidate, best_ms: float) -> bool:
        if self.lower_bound_ms is None:
            return False
        key = candidate.plan.key
        if key not in self._bounds:
            self._bounds[key] = self.lower_bound_ms(candidate.plan)
        return self._bounds[key] > best_ms

    # -- one trial ------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take over what an earlier search found: it costs nothing."""
        for key, candidate in list(self._pending.items()):
            limit_s = self._limit_s(candidate)
            known = self._store.get(key, limit_s=limit_s) if self._store is not None else None
            if known is not None:
                self._take(candidate, known, known.seconds_spent)

    def _try(self, candidate: Candidate) -> None:
        limit_s = self._limit_s(candidate)
        expected = self._outlook.seconds(candidate)
        self._say("step", f"trying {candidate.plan.title} (about {expected:.0f} s)")
        started = self._clock()
        keep = True
        try:
            trial = self._evaluate(candidate.plan, limit_s)
        except TrialFailedError as error:
            trial = failed_within(_failure(candidate, str(error)), error.kind, limit_s)
        except MissingBackendError as error:
            trial = _skip(candidate, str(error))
        except Exception as error:  # it is this plan's trial that failed, not the search
            trial = failed_within(_failure(candidate, _one_line(error)), "error", limit_s)
            keep = False  # it failed on this side, which says nothing about the plan
        seconds = self._clock() - started
        if candidate is self._reference:
            self._reference_s = seconds
        self._begun |= not candidate.baseline
        trial = _completed(trial, seconds, limit_s)
        if keep and self._store is not None:
            self._store.put(trial, key=candidate.plan.key)
        self._take(candidate, trial, seconds)

    def _take(self, candidate: Candidate, trial: Trial, seconds: float) -> None:
        """Take in a trial that has just been made, or one of an earlier search."""
        trial = replace(trial, baseline=candidate.baseline)
        self._pending.pop(candidate.plan.key, None)
        self._tried.append(trial)
        self._outlook.learn(candidate, trial, seconds)
        if sound(trial):
            assert trial.step_ms is not None
            best = self._best_of.get(candidate.family)
            if best is None or trial.step_ms.p50 < best.step_ms:
                self._best_of[candidate.family] = Measured(candidate, trial.step_ms.p50)
        elif trial.status in ("failed", "skipped"):
            self._failed[candidate.plan.backend][candidate.family] = trial.reason
        self._say("trial", _summary(trial), trial)

    def _limit_s(self, candidate: Candidate) -> float:
        """Seconds that a trial may take: never more than what is left, but for the reference."""
        left = self._left()
        if candidate is self._reference:
            return max(left, _OPEN_LIMIT_S) if left < math.inf else 4 * _OPEN_LIMIT_S
        if not candidate.baseline:
            left = max(left, self._granted_s())
        floor = _OPEN_LIMIT_S if self._exhaustive else _LEAST_LIMIT_S
        return min(left, max(floor, _PATIENCE * self._outlook.seconds(candidate)))

    # -- the end --------------------------------------------------------------------------------

    def _account_for_the_rest(self) -> None:
        """Say why what is still pending was not tried; the variations of a family together."""
        variations: defaultdict[str, list[Candidate]] = defaultdict(list)
        for candidate in self._pending.values():
            if candidate.baseline or candidate.coarse or self._exhaustive:
                self._skipped.append(_skip(candidate, self._no_time(candidate)))
            else:
                variations[candidate.family].append(candidate)
        for name, left_out in variations.items():
            best = self._best_of.get(name)
            if best is not None:
                reason = self._why_no_variations(best, left_out)
                self._skipped.append(_skip(left_out[0], reason))

    def _why_no_variations(self, best: Measured, left_out: Sequence[Candidate]) -> str:
        many = f"{len(left_out)} variation{'s' if len(left_out) > 1 else ''} not tried: "
        ratio = best.step_ms / (self._rival_ms(best.candidate) or best.step_ms)
        if ratio > NEAR:
            rival = self._rival_name(best.candidate)
            return many + f"the family's best is {ratio:.1f}x slower than {rival}"
        name = best.candidate.family
        offered = [c for c, _ in self._offers() if c.family == name and not c.coarse]
        if offered:
            return many + self._no_time(offered[0])
        return many + f"no change of {best.candidate.plan.title} is expected to gain"

    def _no_time(self, candidate: Candidate) -> str:
        needed, left = self._outlook.seconds(candidate), max(0.0, self._left())
        return f"about {needed:.0f} s needed, {left:.0f} s of the search's budget left"

    def _notes(self) -> Iterator[str]:
        if self._store is not None and self._store.notice:
            yield self._store.notice
        if self._store is not None and self._store.ignored_lines:
            lines = self._store.ignored_lines
            yield f"{lines} damaged line{'s' if lines > 1 else ''} in the store of trials ignored"

    # -- small things ---------------------------------------------------------------------------

    @property
    def _exhaustive(self) -> bool:
        return math.isinf(self._budget_s)

    def _spent(self) -> float:
        return self._clock() - self._started

    def _left(self) -> float:
        return self._budget_s - self._spent()

    def _granted_s(self) -> float:
        """Seconds that the first plan gets, whatever the budget."""
        return 0.0 if self._begun else self.first_plan * self._reference_s

    def _fits(self, candidate: Candidate) -> bool:
        left = self._left()
        if not candidate.baseline:
            left = max(left, self._granted_s())
        return left > 0 and self._outlook.seconds(candidate) <= left

    def _best_ms(self) -> float | None:
        return min((best.step_ms for best in self._best_of.values()), default=None)

    def _rival_ms(self, candidate: Candidate) -> float | None:
        """Step of the best plan that the candidate is held to."""
        if candidate.plan.quantized:
            return self._best_ms()
        floats = [b.step_ms for b in self._best_of.values() if not b.candidate.plan.quantized]
        return min(floats, default=None)

    def _rival_name(self, candidate: Candidate) -> str:
        same = self._rival_ms(candidate) == self._best_ms()
        return "the best" if same else "the best floating-point plan"

    def _say(self, kind: str, text: str, trial: Trial | None = None) -> None:
        self.on_event(
            Event(
                kind="trial" if kind == "trial" else "step",
                text=text,
                trial=trial,
                spent_s=self._spent(),
                budget_s=self._budget_s,
            )
        )


def _skip(candidate: Candidate, reason: str) -> Trial:
    return Trial(plan=candidate.plan, status="skipped", reason=reason, baseline=candidate.baseline)


def _failure(candidate: Candidate, reason: str) -> Trial:
    return Trial(plan=candidate.plan, status="failed", reason=reason)


def _completed(trial: Trial, seconds: float, limit_s: float) -> Trial:
    """The trial with its duration and, where it failed, how and within which limit."""
    if trial.status == "verified" and not sound(trial):
        trial = replace(trial, status="failed", reason="verified, but it has no usable time")
    trial = replace(trial, seconds_spent=trial.seconds_spent or seconds)
    if trial.status == "failed" and "limit_s" not in trial.details:
        late = seconds >= limit_s
        kind = trial.details.get("failure", "timeout" if late else "error")
        trial = failed_within(trial, kind, limit_s)
    return trial


def _summary(trial: Trial) -> str:
    parts = [trial.plan.title, trial.status]
    if trial.step_ms is not None:
        parts.append(milliseconds(trial.step_ms.p50))
    if trial.reason:
        parts.append(trial.reason)
    if trial.resumed:
        parts.append("from an earlier search")
    return ", ".join(parts)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, SuanliError):
        return text
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
