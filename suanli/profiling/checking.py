"""Applies advice and races the step with it against the step without it."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.base.plan import Plan
from suanli.base.profile_results import Advice
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.measure.timing import Contender, race, timed_calls
from suanli.profiling.subjects import Subject

Remake = Callable[[Plan | TrainPlan, int, Path], Subject]
RACE_SECONDS = 12.0
_TURN_SECONDS = 0.4
_WARM_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class Checker:
    """Tries advice.

    Attributes:
        subject: The step as it was profiled.
        remake: Makes the same step under another plan and batch, with a folder to build in.
        most: How many pieces of advice to try, from the first.
        say: Told what is going on.
        seconds: Time for each race.
    """

    subject: Subject
    remake: Remake
    most: int
    say: Callable[[str], None]
    seconds: float = RACE_SECONDS

    def checked(self, advice: Sequence[Advice]) -> tuple[tuple[Advice, ...], bool]:
        """The advice, the first ones with what they gave when they were tried.

        Changes of the user's own program cannot be tried, and stay without a measured gain.

        Returns:
            The advice, and whether Ctrl-C came before all was tried; what was tried is kept.
        """
        done: list[Advice] = []
        tried = 0
        for index, item in enumerate(advice):
            if (item.plan is None and item.batch is None) or tried >= self.most:
                done.append(item)
                continue
            tried += 1
            self.say(f"trying: {item.change}")
            try:
                done.append(self._tried(item))
            except KeyboardInterrupt:
                return (*done, *advice[index:]), True
        return tuple(done), False

    def _tried(self, item: Advice) -> Advice:
        plan, size = item.plan or self.subject.plan, item.batch or self.subject.batch
        try:
            with tempfile.TemporaryDirectory(prefix="suanli-check-") as folder:
                other = self.remake(plan, size, Path(folder))
                try:
                    ratio = raced(self.subject, other, max_seconds=self.seconds)
                finally:
                    other.close()
        except Exception as error:  # the model's own code may raise anything under another plan
            text = str(error).strip().splitlines() or [type(error).__name__]
            return replace(item, failed=text[0][:200])
        # a step of more samples is worth as much more
        return replace(item, measured_speedup=ratio.scaled(size / self.subject.batch))


def raced(before: Subject, after: Subject, *, max_seconds: float = RACE_SECONDS) -> Estimate:
    """Step of `before` over step of `after`, in alternating turns in this process."""
    sides = [_contender(subject) for subject in (before, after)]
    return race(*sides, blocks=(3, 12), turn_seconds=_TURN_SECONDS, max_seconds=max_seconds).ratio


def _contender(subject: Subject) -> Contender:
    def run(calls: int) -> list[float]:
        with ExitStack() as stack:
            stack.enter_context(subject.conditions())
            return timed_calls(subject.run, calls, sync=subject.sync())

    run(_WARM_CALLS)  # compiles, and makes the libraries' kernels
    return Contender(run=run)
