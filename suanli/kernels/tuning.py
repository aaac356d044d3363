"""Search of a kernel's configurations: compile, prune, time, verify, race, keep.

The search knows no GPU. It gets a `Bench` that compiles, judges, verifies and times; without a GPU
the bench cannot time, and what comes out is a ranking that says so. Every step is kept in the
result, so that `RecordedBench` plays a search again without the device, and in a log where one is
given, so that a search that was cut short goes on where it ended.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

from suanli.base.errors import BadInputError, SuanliError, TrialFailedError
from suanli.base.events import Event, Listener, ignore
from suanli.base.timing import Estimate
from suanli.kernels.compiled import CompiledKernel

Config = Mapping[str, int]
# The first of a ranking are timed until this many in a row were no better than the best.
_PATIENCE = 24
_RANKING = "a ranking by the static model: nothing was timed, because there is no GPU here"
# Shares of the budget after which compiling and timing end, so that the rivals get theirs.
_COMPILED, _TIMED = 0.5, 0.75


@dataclass(frozen=True, kw_only=True)
class Static:
    """What is known of a configuration before it runs.

    Attributes:
        functions: What the compiler made.
        predicted_ms: The static model's figure, for ordering only.
        occupancy: Share of resident warps, 0 to 1.
        limited_by: What limits it.
        reason: Why it cannot be used; "" if it can.
    """

    functions: tuple[CompiledKernel, ...] = ()
    predicted_ms: float = 0.0
    occupancy: float = 0.0
    limited_by: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RaceFigures:
    """A rival's time against the winner's, in alternation on new timings.

    Attributes:
        rival_ms: Of the rival.
        winner_ms: Of the winner.
        speedup: The rival's time over the winner's; above 1 the winner is faster.
    """

    rival_ms: Estimate
    winner_ms: Estimate
    speedup: Estimate


@dataclass(frozen=True, kw_only=True)
class SearchLimits:
    """How much a search may try.

    Attributes:
        most: Configurations that are compiled at most.
        timeout_s: Of one compilation; a timing gets twice, a check five times and a race with a
            rival, which may have to compile first, ten times as much.
        budget_s: Of the whole. What runs when it is over is not ended, but nothing more is begun.
    """

    most: int = 400
    timeout_s: float = 60.0
    budget_s: float = math.inf

    def check(self) -> None:
        """Raise BadInputError where nothing could be done within them."""
        if self.most < 1:
            raise BadInputError("--most must be at least 1")
        for name, seconds in (("--timeout", self.timeout_s), ("--budget", self.budget_s)):
            if not seconds > 0:
                raise BadInputError(f"{name} must be more than 0 s, not {seconds:g}")


class Log(Protocol):
    """Keeps trials while a search runs, for the run that goes on with it."""

    def known(self) -> Mapping[str, "TuneTrial"]:
        """Trials of a run that was cut short, by `trial_key`."""
        ...

    def add(self, trial: "TuneTrial") -> None:
        """Keep one; a later one of the same configuration counts."""
        ...

    def done(self) -> None:
        """The search came to its end: forget them."""
        ...


class Bench(Protocol):
    """Where configurations are tried."""

    can_time: bool
    where: str

    def compile(self, config: Config) -> Static:
        """Compile a configuration and judge it; what cannot be used has a `reason`."""
        ...

    def verify(self, config: Config) -> str:
        """Why the outputs are wrong, or "" where they are right."""
        ...

    def time(self, config: Config) -> Estimate:
        """Milliseconds per call with cold caches.

        Raises:
            TrialFailedError: It crashed, hung or ran out of memory.
        """
        ...

    def rivals(self) -> Sequence[str]:
        """What else computes the same here: "eager", "torch.compile", libraries."""
        ...

    def race(self, config: Config, rival: str) -> RaceFigures:
        """Both in alternation.

        Raises:
            TrialFailedError: The rival fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TuneTrial:
    """One configuration tried.

    Attributes:
        status: "verified", "rejected" (wrong), "failed" (does not compile, crash, time-out),
            "pruned" (cannot or need not run) or "ranked" (judged, not run).
        reason: One line; "" where it is verified or ranked.
    """

    config: dict[str, int]
    status: str
    static: Static
    step_ms: Estimate | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """A whole search.

    Attributes:
        config: The winner; None where nothing can be used.
        ranking: Whether nothing was timed: then `config` is a guess by the static model.
        where: The bench, in words.
        note: One line that a person should read.
        step_ms: The winner's time in the search, which is biased downwards; `races` are not.
        races: Against each rival.
        interrupted: Whether Ctrl-C ended it.
        out_of_time: Whether its budget did.
    """

    kernel: str
    sizes: dict[str, int]
    dtype: str
    where: str
    ranking: bool
    trials: tuple[TuneTrial, ...]
    config: dict[str, int] | None = None
    step_ms: Estimate | None = None
    verified: bool = False
    races: dict[str, RaceFigures] = field(default_factory=dict)
    note: str = ""
    interrupted: bool = False
    out_of_time: bool = False

    @property
    def speedup_lo95(self) -> float | None:
        """Lower limit of the speed-up over the fastest rival; None where none ran."""
        limits = [figures.speedup.lo95 for figures in self.races.values()]
        return min(limits) if limits else None


def configurations(
    tunables: Mapping[str, tuple[int, ...]], legal: Callable[[Config], bool], default: Config
) -> list[dict[str, int]]:
    """All legal configurations, the default one first."""
    names = list(tunables)
    rest = [dict(zip(names, values, strict=True)) for values in product(*tunables.values())]
    first = dict(default)
    return [first, *(c for c in rest if c != first and legal(c))]


def tune(
    kernel: str,
    sizes: Mapping[str, int],
    dtype: str,
    candidates: Sequence[Config],
    bench: Bench,
    *,
    limits: SearchLimits | None = None,
    log: Log | None = None,
    listener: Listener = ignore,
) -> TuneResult:
    """Find the fastest configuration whose answer is right.

    Args:
        kernel: Its name.
        sizes: The shape.
        dtype: Of the main input.
        candidates: Configurations, the default one first, as `configurations` gives them.
        bench: Where they are tried.
        limits: Of configurations and time. Where there are more configurations they are taken at
            even distances, the first always.
        log: Keeps every trial as it comes, and knows those of a run that was cut short.
        listener: Told of progress. Ctrl-C ends the search with what was found so far.

    Raises:
        BadInputError: There is no candidate, or the limits leave no room for one.
    """
    if not candidates:
        raise BadInputError(f"{kernel}: no configuration is legal at {dict(sizes)}")
    limits = limits or SearchLimits()
    limits.check()
    search = _Search(bench, limits, log, listener)
    interrupted = False
    try:
        search.judge(_spread(candidates, limits.most))
        if bench.can_time:
            search.time()
    except KeyboardInterrupt:
        interrupted = True
    trials = search.trials
    winner = _winner(trials, bench.can_time)
    made = TuneResult(
        kernel=kernel,
        sizes=dict(sizes),
        dtype=dtype,
        where=bench.where,
        ranking=not bench.can_time,
        trials=tuple(trials.values()),
        config=winner.config if winner else None,
        step_ms=winner.step_ms if winner else None,
        verified=winner is not None and winner.status == "verified",
        interrupted=interrupted,
        out_of_time=not interrupted and search.left > 0,
        note=search.note(interrupted),
    )
    made = _finished(made, winner, search)
    if log is not None and not (made.interrupted or made.out_of_time):
        log.done()
    return made


def _finished(made: TuneResult, winner: TuneTrial | None, search: "_Search") -> TuneResult:
    """Verify a ranking's first, or race a timed winner; not after Ctrl-C."""
    if winner is None:
        return _noted(made, "no configuration can be used; the trials say why")
    if made.interrupted:
        return _noted(
            made, "" if search.bench.can_time else _RANKING + "; its first is not verified"
        )
    if not search.bench.can_time:
        try:
            wrong = search.bench.verify(winner.config)
        except KeyboardInterrupt:
            wrong, made = "the check was interrupted", replace(made, interrupted=True)
        note = _RANKING + (f"; not verified: {wrong}" if wrong else "")
        return _noted(replace(made, verified=not wrong), note)
    races: dict[str, RaceFigures] = {}
    notes: list[str] = []
    for rival in search.bench.rivals():
        search.listener(Event(kind="step", text=f"racing {rival}"))
        try:
            if search.over(1.0):
                notes.append(f"{rival}: not raced, the {search.limits.budget_s:g} s were over")
                made = replace(made, out_of_time=True)
                continue
            races[rival] = search.bench.race(winner.config, rival)
        except SuanliError as failure:  # absent, or without such a kernel: data like the rest
            notes.append(f"{rival}: {failure}")
        except KeyboardInterrupt:
            notes.append("interrupted: not every rival was raced")
            made = replace(made, interrupted=True)
            break
    return _noted(replace(made, races=races), *notes)


def _noted(made: TuneResult, *notes: str) -> TuneResult:
    return replace(made, note="; ".join(note for note in (made.note, *notes) if note))


class _Search:
    """The trials of a search as they come.

    Args:
        bench: Where they are tried.
        limits: Of time.
        log: Keeps them.
        listener: Told of progress.
    """

    def __init__(
        self, bench: Bench, limits: SearchLimits, log: Log | None, listener: Listener
    ) -> None:
        self.bench, self.limits, self.listener = bench, limits, listener
        self.trials: dict[str, TuneTrial] = {}
        self.left = 0  # configurations that nothing was tried of, for want of time
        self._log, self._begin = log, time.monotonic()
        # what failed is tried again: the limit may be another one now
        known = log.known() if log else {}
        self._known = {key: trial for key, trial in known.items() if trial.status != "failed"}
        self._resumed = 0

    def over(self, share: float) -> bool:
        """Whether so much of the budget is spent."""
        return time.monotonic() - self._begin > share * self.limits.budget_s

    def note(self, interrupted: bool) -> str:
        """How it ended before its end, and what it went on with."""
        notes = []
        if self._resumed:
            notes.append(f"{self._resumed} were known from a run that was cut short")
        if interrupted:
            notes.append(
                "interrupted: the search is not complete; the same command goes on with it"
            )
        elif self.left:
            notes.append(
                f"the {self.limits.budget_s:g} s were over with {self.left} configurations left; "
                "the same command goes on with them"
            )
        return "; ".join(notes)

    def judge(self, candidates: Sequence[Config]) -> None:
        """Compile each; what cannot be used is failed (no code) or pruned (code that cannot run).

        The first is compiled whatever the time.
        """
        share = _COMPILED if self.bench.can_time else 1.0
        for done, config in enumerate(candidates):
            known = self._known.get(trial_key(config))
            if known is not None:
                self._resumed += 1
                status = "ranked" if not known.static.reason else known.status
                reason = known.static.reason
                self.trials[trial_key(config)] = replace(
                    known, status=status, reason=reason, step_ms=None
                )
                continue
            if done and self.over(share):
                self.left += 1
                continue
            self.listener(Event(kind="step", text=f"compiling {done + 1} of {len(candidates)}"))
            static = self.bench.compile(config)
            status = "ranked" if not static.reason else ("pruned" if static.functions else "failed")
            self._keep(
                TuneTrial(config=dict(config), status=status, static=static, reason=static.reason)
            )

    def time(self) -> None:
        """Time the ranking from its top; whatever would be the best so far is verified first.

        Ends when `_PATIENCE` in a row brought nothing; what is left is pruned and says so.
        """
        order = _ranking(self.trials.values())
        best, idle = math.inf, 0
        for position, trial in enumerate(order, 1):
            if idle >= _PATIENCE:
                reason = (
                    f"ranked {position} of {len(order)}; the {_PATIENCE} before brought nothing"
                )
                self._keep(replace(trial, status="pruned", reason=reason))
                continue
            known = self._known.get(trial_key(trial.config))
            if known is None or known.step_ms is None:
                if position > 1 and self.over(_TIMED if best < math.inf else 1.0):
                    self.left += 1
                    continue
                self.listener(Event(kind="step", text=f"timing {position} of {len(order)}"))
                known = self._timed(trial, best)
            idle += 1
            if known.status == "verified" and known.step_ms and known.step_ms.p50 < best:
                best, idle = known.step_ms.p50, 0
            self._keep(known)

    def _timed(self, trial: TuneTrial, best: float) -> TuneTrial:
        try:
            step = self.bench.time(trial.config)
            faster = step.p50 < best
            wrong = self.bench.verify(trial.config) if faster else ""
        except SuanliError as failure:
            return replace(trial, status="failed", reason=str(failure))
        if wrong:
            return replace(trial, status="rejected", reason=wrong, step_ms=step)
        if faster:
            return replace(trial, status="verified", step_ms=step)
        return replace(trial, status="pruned", step_ms=step, reason="slower than the best")

    def _keep(self, trial: TuneTrial) -> None:
        key = trial_key(trial.config)
        self.trials[key] = trial
        if self._log is not None and self._known.get(key) != trial:
            self._log.add(trial)


def _ranking(trials: Iterable[TuneTrial]) -> list[TuneTrial]:
    """Those that can run, the most promising first; the default one, which came first, leads."""
    usable = [trial for trial in trials if trial.status == "ranked"]
    return usable[:1] + sorted(usable[1:], key=lambda trial: trial.static.predicted_ms)


def _winner(trials: Mapping[str, TuneTrial], timed: bool) -> TuneTrial | None:
    if timed:
        right = [t for t in trials.values() if t.status == "verified" and t.step_ms is not None]
        return min(right, key=lambda t: t.step_ms.p50 if t.step_ms else math.inf, default=None)
    usable = [t for t in trials.values() if t.status == "ranked"]
    return min(usable, key=lambda t: t.static.predicted_ms, default=None)


def _spread(candidates: Sequence[Config], most: int) -> list[Config]:
    """At most `most` of them at even distances, the first among them."""
    if len(candidates) <= most:
        return list(candidates)
    return [candidates[i * len(candidates) // most] for i in range(most)]


def trial_key(config: Config) -> str:
    """A configuration as text, whatever the order of its names."""
    return str(sorted(config.items()))


class RecordedBench:
    """Plays a recorded search again: the same answers without the device or the compiler.

    Args:
        record: What `tune` gave.
    """

    def __init__(self, record: TuneResult) -> None:
        self._record = record
        self._trials = {trial_key(trial.config): trial for trial in record.trials}
        self.can_time = not record.ranking
        self.where = f"recorded: {record.where}"

    def compile(self, config: Config) -> Static:
        """As recorded."""
        trial = self._trials.get(trial_key(config))
        return trial.static if trial else Static(reason="not in the record")

    def verify(self, config: Config) -> str:
        """As recorded."""
        trial = self._trials[trial_key(config)]
        if not self.can_time:
            return "" if self._record.verified else "it was not verified when it was recorded"
        return trial.reason if trial.status == "rejected" else ""

    def time(self, config: Config) -> Estimate:
        """As recorded.

        Raises:
            TrialFailedError: It failed, or was not timed, when it was recorded.
        """
        trial = self._trials[trial_key(config)]
        if trial.step_ms is None:
            raise TrialFailedError(trial.reason or "it was not timed", kind="error")
        return trial.step_ms

    def rivals(self) -> Sequence[str]:
        """As recorded."""
        return tuple(self._record.races)

    def race(self, config: Config, rival: str) -> RaceFigures:
        """As recorded."""
        return self._record.races[rival]
