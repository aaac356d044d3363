"""Search of a kernel's configurations: compile, prune, time, verify, race, keep.

The search knows no GPU. It gets a `Bench` that compiles, judges, verifies and times; without a GPU
the bench cannot time, and what comes out is a ranking that says so. Every step is kept in the
result, so that `RecordedBench` plays a search again without the device.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    most: int = 400,
    listener: Listener = ignore,
) -> TuneResult:
    """Find the fastest configuration whose answer is right.

    Args:
        kernel: Its name.
        sizes: The shape.
        dtype: Of the main input.
        candidates: Configurations, the default one first, as `configurations` gives them.
        bench: Where they are tried.
        most: How many are compiled at most; evenly taken where there are more, the first always.
        listener: Told of progress. Ctrl-C ends the search with what was found so far.

    Raises:
        BadInputError: There is no candidate.
    """
    if not candidates:
        raise BadInputError(f"{kernel}: no configuration is legal at {dict(sizes)}")
    trials: dict[str, TuneTrial] = {}
    interrupted = False
    try:
        for trial in _judged(_spread(candidates, most), bench, listener):
            trials[_key(trial.config)] = trial
        if bench.can_time:
            for trial in _timed(trials, bench, listener):
                trials[_key(trial.config)] = trial
    except KeyboardInterrupt:
        interrupted = True
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
    )
    return _finished(made, winner, bench, interrupted, listener)


def _finished(
    made: TuneResult,
    winner: TuneTrial | None,
    bench: Bench,
    interrupted: bool,
    listener: Listener,
) -> TuneResult:
    """Verify a ranking's first, or race a timed winner."""
    if winner is None:
        return replace(made, note="no configuration can be used; the trials say why")
    if not bench.can_time:
        wrong = "the search was interrupted" if interrupted else bench.verify(winner.config)
        note = "a ranking by the static model: nothing was timed, because there is no GPU here"
        note += f"; not verified: {wrong}" if wrong else ""
        return replace(made, note=note, verified=not wrong)
    races: dict[str, RaceFigures] = {}
    notes = ["interrupted: the search is not complete, and no rival was raced"] * interrupted
    for rival in () if interrupted else bench.rivals():
        listener(Event(kind="step", text=f"racing {rival}"))
        try:
            races[rival] = bench.race(winner.config, rival)
        except SuanliError as failure:  # absent, or without such a kernel: data like the rest
            notes.append(f"{rival}: {failure}")
        except KeyboardInterrupt:
            notes.append("interrupted: not every rival was raced")
            break
    return replace(made, races=races, note="; ".join(notes))


def _judged(candidates: Sequence[Config], bench: Bench, listener: Listener) -> Iterator[TuneTrial]:
    """Compile each; what cannot be used is failed (no code) or pruned (code that cannot run)."""
    for done, config in enumerate(candidates, 1):
        listener(Event(kind="step", text=f"compiling {done} of {len(candidates)}"))
        static = bench.compile(config)
        status = "ranked" if not static.reason else ("pruned" if static.functions else "failed")
        yield TuneTrial(config=dict(config), status=status, static=static, reason=static.reason)


def _timed(
    judged: Mapping[str, TuneTrial], bench: Bench, listener: Listener
) -> Iterator[TuneTrial]:
    """Time the ranking from its top; whatever would be the best so far is verified first.

    Ends when `_PATIENCE` in a row brought nothing; what is left is pruned and says so.
    """
    order = _ranking(judged.values())
    best, idle = math.inf, 0
    for position, trial in enumerate(order, 1):
        if idle >= _PATIENCE:
            reason = f"ranked {position} of {len(order)}; the {_PATIENCE} before brought nothing"
            yield replace(trial, status="pruned", reason=reason)
            continue
        listener(Event(kind="step", text=f"timing {position} of {len(order)}"))
        idle += 1
        try:
            step = bench.time(trial.config)
            faster = step.p50 < best
            wrong = bench.verify(trial.config) if faster else ""
        except SuanliError as failure:
            yield replace(trial, status="failed", reason=str(failure))
            continue
        if wrong:
            yield replace(trial, status="rejected", reason=wrong, step_ms=step)
        elif faster:
            best, idle = step.p50, 0
            yield replace(trial, status="verified", step_ms=step)
        else:
            yield replace(trial, status="pruned", step_ms=step, reason="slower than the best")


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


def _key(config: Config) -> str:
    return str(sorted(config.items()))


class RecordedBench:
    """Plays a recorded search again: the same answers without the device or the compiler.

    Args:
        record: What `tune` gave.
    """

    def __init__(self, record: TuneResult) -> None:
        self._record = record
        self._trials = {_key(trial.config): trial for trial in record.trials}
        self.can_time = not record.ranking
        self.where = f"recorded: {record.where}"

    def compile(self, config: Config) -> Static:
        """As recorded."""
        trial = self._trials.get(_key(config))
        return trial.static if trial else Static(reason="not in the record")

    def verify(self, config: Config) -> str:
        """As recorded."""
        trial = self._trials[_key(config)]
        if not self.can_time:
            return "" if self._record.verified else "it was not verified when it was recorded"
        return trial.reason if trial.status == "rejected" else ""

    def time(self, config: Config) -> Estimate:
        """As recorded.

        Raises:
            TrialFailedError: It failed, or was not timed, when it was recorded.
        """
        trial = self._trials[_key(config)]
        if trial.step_ms is None:
            raise TrialFailedError(trial.reason or "it was not timed", kind="error")
        return trial.step_ms

    def rivals(self) -> Sequence[str]:
        """As recorded."""
        return tuple(self._record.races)

    def race(self, config: Config, rival: str) -> RaceFigures:
        """As recorded."""
        return self._record.races[rival]
