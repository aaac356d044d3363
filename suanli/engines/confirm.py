"""The confirmation race: the finished engine against the baselines, on timings of their own."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.base import codec
from suanli.base.errors import SuanliError
from suanli.base.hardware import Environment
from suanli.base.plan import Plan
from suanli.base.results import Confirmation, OptimizeResult
from suanli.base.timing import Estimate
from suanli.base.trial import Trial, ValueCheck
from suanli.engines.evaluate import Setting, build_call, fastest_at, ships, timing_at
from suanli.measure.isolation import Worker
from suanli.measure.timing import Contender, race

_ENGINE_HOST = "suanli.engines.host:EngineHost"
_TRIAL_HOST = "suanli.engines.host:TrialHost"
_CALL_S = 300.0  # deadline of one turn of a race; a turn is some hundred milliseconds
_WIDE = 1.25  # upper over lower end of a 95 % interval
_UNITY = Estimate(p50=1.0, lo95=1.0, hi95=1.0)


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """What a fresh process found in the finished engine.

    Attributes:
        values: Check of the values of its floating-point plans, each at the batch sizes that it
            serves; None where all plans are quantised.
        quantised: Whether a quantised plan serves any batch size.
        relative_error: Largest relative RMS error of any output at the batch sizes that quantised
            plans serve; None where it is not finite, and where there are none.
        portable: Whether it fell back to its portable plan, which here would be a fault.
        differences: What differs from the environment it was made in.
    """

    values: ValueCheck | None
    quantised: bool
    relative_error: float | None
    portable: bool
    differences: tuple[str, ...]


class EngineProcess:
    """A fresh process that has opened an engine as its user would."""

    def __init__(self, engine: Path, setting: Setting, *, timeout_s: float = 300.0) -> None:
        self._setting = setting
        self._worker = Worker(
            _ENGINE_HOST,
            {
                "engine": str(engine),
                "verification": str(setting.verification),
                "backend_modules": list(setting.backend_modules),
            },
            start_timeout_s=timeout_s,
        )

    def verify(
        self, plans: Sequence[Plan], variant_of: Mapping[int, int], *, timeout_s: float
    ) -> Reopened:
        """Check every plan again at every promised batch size that it serves.

        Args:
            plans: The plans in the engine.
            variant_of: Promised batch size -> which of them serves it.
            timeout_s: Deadline of one plan's check.
        """
        state = self._worker.call("state", timeout_s=timeout_s)
        checks: list[ValueCheck] = []
        errors: list[float | None] = []
        for index, plan in enumerate(plans):
            batches = [batch for batch, variant in variant_of.items() if variant == index]
            if plan.quantized:
                errors += self._worker.call("relative_errors", timeout_s=timeout_s, batches=batches)
            elif batches:
                answer = self._worker.call(
                    "check_values",
                    timeout_s=timeout_s,
                    precision=plan.precision,
                    batches=batches,
                    k=self._setting.k,
                )
                checks.append(codec.from_json(ValueCheck, answer))
        finite = [error for error in errors if error is not None]
        return Reopened(
            values=_together(checks) if checks else None,
            quantised=bool(errors),
            relative_error=max(finite) if finite and len(finite) == len(errors) else None,
            portable=state["portable"],
            differences=tuple(state["differences"]),
        )

    def predict(self, samples: Path, out: Path, batch: int, *, timeout_s: float) -> None:
        """Write the engine's first output on labelled samples, called at a batch size."""
        self._worker.call(
            "predict", timeout_s=timeout_s, samples=str(samples), out=str(out), batch=batch
        )

    def contender(self, batch: int) -> Contender:
        """The engine's side of a race."""
        return _contender(self._worker, batch)

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def confirm(
    engine: EngineProcess,
    baselines: Sequence[Trial],
    setting: Setting,
    *,
    seconds: float,
    variant_of: dict[int, int],
    chosen: Plan,
) -> tuple[Confirmation, ...]:
    """Race the engine against eager fp32 and the best baseline at every promised batch size.

    Args:
        engine: The finished engine in its process.
        baselines: All baselines that were tried; only verified ones race.
        setting: Batch sizes and folders.
        seconds: Wall time for all races together.
        variant_of: Batch size -> which of the engine's plans serves it.
        chosen: The plan that the search chose; racing it against itself is not done.

    Raises:
        SuanliError: Eager fp32 is not among the verified baselines.
    """
    batches = [setting.batch, *setting.other_batches]
    verified = [trial for trial in baselines if trial.status == "verified"]
    eager = next(
        (t for t in verified if t.plan.backend == "eager" and t.plan.precision == "fp32"), None
    )
    if eager is None:
        raise SuanliError("there is no verified eager fp32 to race against")
    rivals = {b: fastest_at(verified, b) or eager for b in batches}
    # the asked batch carries the published figures, so its races get a double share
    shares = 2 * (1 if rivals[batches[0]].plan == eager.plan else 2) + len(batches) - 1
    share = seconds / shares
    found = []
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def side(trial: Trial, batch: int) -> Contender:
            key = trial.plan.key
            if key not in workers:
                workers[key] = stack.enter_context(_open(trial, setting))
            return _contender(workers[key], batch)

        for batch in batches:
            rival = rivals[batch]
            asked = batch == setting.batch
            length = share * (2 if asked else 1)
            blocks = (4, 24) if asked else (3, 12)
            best = race(
                side(rival, batch), engine.contender(batch), blocks=blocks, max_seconds=length
            )
            versus_eager: Estimate | None = best.ratio
            if rival.plan != eager.plan:
                versus_eager = None
                if asked:
                    mine = engine.contender(batch)
                    against = race(side(eager, batch), mine, max_seconds=length)
                    versus_eager = against.ratio
                    if against.ratio.p50 < best.ratio.p50:
                        rival, best = eager, against  # the race knows better than the search
            itself = chosen == rival.plan
            found.append(
                Confirmation(
                    batch=batch,
                    step_ms=best.b_ms,
                    samples_per_s=batch / best.b_ms.p50 * 1e3,
                    speedup_vs_eager=versus_eager,
                    speedup_vs_best_baseline=_UNITY if itself else best.ratio,
                    baseline_ms=best.b_ms if itself else best.a_ms,
                    best_baseline=rival.plan,
                    variant=variant_of.get(batch, 0),
                    note=_note(best.ratio, rival.plan, batch) if not itself else "",
                )
            )
    return tuple(found)


def losing_batches(confirmations: Sequence[Confirmation]) -> list[int]:
    """Batch sizes at which the engine is clearly slower than the best baseline."""
    return [c.batch for c in confirmations if c.speedup_vs_best_baseline.hi95 < 1.0]


def rough(confirmations: Sequence[Confirmation], environment: Environment) -> str:
    """What is said where a race's interval is so wide that something must have run beside it.

    On a machine that does nothing else the races end within a few per cent; load from outside comes
    and goes and widens the interval.

    Args:
        confirmations: The races.
        environment: As it is right after them.

    Returns:
        One line with the widest interval and the load; "" where all are narrow.
    """
    ratios = [
        (ratio, confirmation.batch)
        for confirmation in confirmations
        for ratio in (confirmation.speedup_vs_eager, confirmation.speedup_vs_best_baseline)
        if ratio is not None
    ]
    widest, batch = max(ratios, key=lambda pair: pair[0].hi95 / pair[0].lo95)
    if widest.hi95 <= _WIDE * widest.lo95:
        return ""
    load = ""
    if environment.load_average is not None:
        load = f" (load average {environment.load_average:.1f} on {environment.cores} cores)"
    return (
        f"the machine was busy{load}: the speed-up at batch {batch}, {widest.lo95:.2f}x to "
        f"{widest.hi95:.2f}x, is rough; run it again when nothing else runs"
    )


def variants_for(
    winner: Trial, trials: Sequence[Trial], baselines: Sequence[Trial], setting: Setting
) -> dict[int, Trial]:
    """Which trial serves which batch size.

    The winner serves all of them, but for those where a baseline is faster by the search's own
    timings: there the fastest verified trial of that size serves.
    """
    serving = {setting.batch: winner}
    for batch in setting.other_batches:
        serving[batch] = winner
        mine, rival = timing_at(winner, batch), fastest_at(baselines, batch)
        theirs = timing_at(rival, batch) if rival else None
        if mine is None or (theirs is not None and theirs.step_ms.p50 < mine.step_ms.p50):
            candidates = [
                trial
                for trial in trials
                if trial.plan == winner.plan or (not trial.plan.quantized and ships(trial.plan))
            ]
            serving[batch] = fastest_at(candidates, batch) or winner
    return serving


def shippable_baseline(
    batch: int, confirmations: Sequence[Confirmation], trials: Sequence[Trial]
) -> Trial | None:
    """The trial that can ship in place of the baseline that won at a batch size.

    A baseline that runs the user's own module cannot be saved; the same plan on the exported
    program can.
    """
    rival = next((c.best_baseline for c in confirmations if c.batch == batch), None)
    if rival is None:
        return None
    options = {name: value for name, value in rival.options.items() if name != "source"}
    wanted = rival.with_(options=options)
    return next(
        (trial for trial in trials if trial.plan == wanted and trial.status == "verified"), None
    )


def baseline_wins(result: OptimizeResult, trials: Sequence[Trial]) -> OptimizeResult:
    """The result where the best baseline beat the best engine at the asked batch.

    The baseline is what was chosen. Its speed-up over eager fp32 comes from the two races of the
    engine, against eager fp32 and against the baseline; the ends of its interval are the worst and
    the best that both allow.
    """
    first = result.confirmations[0]
    eager, rival = result.speedup_vs_eager, result.speedup_vs_best_baseline
    rival_trial = next(trial for trial in trials if trial.plan == result.baseline.plan)
    is_eager = rival_trial.plan.backend == "eager" and rival_trial.plan.precision == "fp32"
    over_eager = Estimate(
        p50=eager.p50 / rival.p50, lo95=eager.lo95 / rival.hi95, hi95=eager.hi95 / rival.lo95
    )
    lost = (
        f"nothing beat {result.baseline.plan.title}: the best engine, {result.chosen.plan.title}, "
        f"runs at {rival.p50:.2f}x its speed ({rival.lo95:.2f} to {rival.hi95:.2f}); keep your "
        "model as it is. No engine was written; --keep writes that one"
    )
    notes = [note for note in result.notes if note != first.note]
    return replace(
        result,
        chosen=result.baseline,
        speedup_vs_eager=_UNITY if is_eager else over_eager,
        speedup_vs_best_baseline=_UNITY,
        quality=None,
        values=rival_trial.values,
        sol=None,
        engine_dir=None,
        relative_error=None,
        confirmations=(first,),  # of other batch sizes only the engine's races are known
        notes=(lost, *notes),
    )


def build_folder(trial: Trial, setting: Setting) -> Path:
    """Where the trial's plan was, or will be, built; a built plan may say more than the asked."""
    return setting.builds / (trial.build_dir or trial.plan.key)


def ensure_built(trial: Trial, setting: Setting) -> None:
    """Build a trial's plan anew where its folder is gone (a trial of an earlier search)."""
    if not build_folder(trial, setting).exists():
        _open(trial, setting).close()


def _together(checks: Sequence[ValueCheck]) -> ValueCheck:
    """One check of all: the first that fails, else the one with the largest error."""
    failed = next((check for check in checks if not check.ok), None)
    shown = failed or max(checks, key=lambda check: check.relative_rms or 0.0)
    batches = tuple(batch for check in checks for batch in check.batches)
    return replace(shown, batches=batches)


def _note(ratio: Estimate, rival: Plan, batch: int) -> str:
    if ratio.lo95 >= 1.0:
        return ""
    if ratio.hi95 < 1.0:
        return f"slower than {rival.title} at batch {batch}: {ratio.p50:.2f}x"
    return f"not told apart from {rival.title} at batch {batch}"


def _open(trial: Trial, setting: Setting) -> Worker:
    worker = Worker(
        _TRIAL_HOST,
        {
            "program": str(setting.program),
            "plan": codec.to_json(trial.plan),
            "folder": str(build_folder(trial, setting)),
            "verification": str(setting.verification),
            "backend_modules": list(setting.backend_modules),
        },
    )
    try:
        if not build_folder(trial, setting).exists():
            worker.call("build", timeout_s=_CALL_S, **build_call(trial.plan, setting))
        worker.call("open", timeout_s=_CALL_S)
    except BaseException:
        worker.close()
        raise
    return worker


def _contender(worker: Worker, batch: int) -> Contender:
    def run(calls: int) -> list[float]:
        times: list[float] = worker.call("block", timeout_s=_CALL_S, batch=batch, calls=calls)
        return times

    return Contender(run=run, pause=worker.pause, resume=worker.resume)
