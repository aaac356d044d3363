"""Hyper-parameters searched by Optuna, over the ranges that a recipe declares.

The study lies in an SQLite file, so that a second call goes on with it. The settings as written are
its first trial; trials that fall behind the median of the others at an epoch's end are ended.
Quality is that of the watched part; the acceptance part is not looked at.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener
from suanli.base.lazy import need
from suanli.training.checks import check_samples
from suanli.training.fit import default_plan
from suanli.training.forward import machine_as_planned
from suanli.training.judging import metric_of
from suanli.training.loop import Limits, Loop, NotFiniteError
from suanli.training.recipe import Range, Recipe
from suanli.training.start import held_out_end, starting_point
from suanli.training.step import Stepper
from suanli.training.stopping import StopRequests
from suanli.workloads.record import Samples

_OVER = ("COMPLETE", "PRUNED")  # trials that count; others were cut short
_WRITTEN = "as_written"  # marks the trial of the settings as written
_PRUNER = "the pruner"  # who asks a trial to end that falls behind
_FACTOR = 10.0  # how far a rate or a decay is searched to both sides, where nothing is declared


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a study found.

    Attributes:
        recipe: With the best settings.
        values: The best value of each hyper-parameter.
        quality: Of the best trial, on the watched part.
        as_written: The same of the settings as written; None where that trial did not end.
        trials: Trials of the study so far, those of earlier calls included.
    """

    recipe: Recipe
    values: dict[str, float | int | str]
    quality: float
    as_written: float | None
    trials: int


def tune(
    recipe: Recipe, trials: int, study: Path, *, seed: int, device: str, listener: Listener
) -> Tuned:
    """Run trials until the study has so many.

    Args:
        recipe: What is trained; `ranges` says what is searched.
        trials: How many in all.
        study: SQLite file; made where there is none.
        seed: Of training, the same in all trials, and of the search.
        device: "cpu", "cuda:0", …
        listener: Told of each trial.

    Raises:
        BadInputError: A range names no hyper-parameter, or no trial ended well.
        MissingBackendError: Optuna is absent.
        KeyboardInterrupt: The person stopped it; what was tried is in the file.
    """
    optuna = need("optuna", "pip install 'suanli[tune]'")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranges = recipe.ranges or default_ranges(recipe)
    for name in ranges:
        if not hasattr(recipe.settings, name):
            raise BadInputError(f"{name!r} is no hyper-parameter that could be searched")
    objective = _Objective(recipe, ranges, seed=seed, device=device, optuna=optuna)
    study.parent.mkdir(parents=True, exist_ok=True)  # not for data that cannot be used
    found = optuna.create_study(
        storage=f"sqlite:///{study.resolve()}",
        study_name=recipe.name,
        load_if_exists=True,
        direction="minimize" if objective.metric == "loss" else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    if not any(_as_written(t) and t.state.name in (*_OVER, "WAITING") for t in found.trials):
        # also where an earlier call was stopped in the midst of it
        written = {name: getattr(recipe.settings, name) for name in ranges}
        found.enqueue_trial(written, user_attrs={_WRITTEN: True})
    # a generator that began anew would draw the trials of the first call again
    found.sampler = optuna.samplers.TPESampler(seed=seed + len(found.trials))
    while (done := sum(t.state.name in _OVER for t in found.trials)) < trials:
        listener(Event(kind="step", text=f"hyper-parameters, trial {done + 1} of {trials}"))
        found.optimize(objective, n_trials=1)
    return _best(recipe, found, ranges)


def said(value: float | int | str) -> str:
    """A hyper-parameter in words."""
    return value if isinstance(value, str) else f"{value:.4g}"


def default_ranges(recipe: Recipe) -> dict[str, Range]:
    """The rate, and the decay where there is one, ten times to both sides."""
    settings = recipe.settings
    names = ["lr", *(["weight_decay"] if settings.weight_decay else [])]
    return {
        name: Range(
            low=getattr(settings, name) / _FACTOR, high=getattr(settings, name) * _FACTOR, log=True
        )
        for name in names
    }


class _Objective:
    """Trains with the hyper-parameters of one trial and gives the quality."""

    def __init__(
        self, recipe: Recipe, ranges: dict[str, Range], *, seed: int, device: str, optuna: Any
    ) -> None:
        assert recipe.workload.data is not None
        data = recipe.workload.load()
        self._recipe, self._ranges, self._optuna = recipe, ranges, optuna
        self._seed, self._device = seed, device
        self._train, held_out = held_out_end(data.train, recipe.settings.validation_split)
        model = starting_point(recipe, self._train, seed)
        self._train = check_samples(model, recipe, self._train)
        watched = held_out or data.search
        self._watched: Samples = check_samples(model, recipe, watched, part="search")
        self.metric = metric_of(self._watched)

    def __call__(self, trial: Any) -> float:
        values = {name: _suggested(trial, name, one) for name, one in self._ranges.items()}
        recipe = replace(self._recipe, settings=replace(self._recipe.settings, **values))
        plan = default_plan(recipe, self._device, self._train)
        with machine_as_planned(plan), StopRequests() as stop:
            loop = self._loop(recipe, plan)
            self._follow(loop, trial, stop)
            reason = ""
            try:
                loop.run(stop)
                if not stop.asked:
                    if loop.averaging is not None:
                        loop.averaging.finish()
                    loop.watch()
            except NotFiniteError as error:
                reason = str(error)
        if stop.asked not in ("", _PRUNER):  # also in the last judgement, which may be cut short
            raise KeyboardInterrupt
        if stop.asked or reason:
            raise self._optuna.TrialPruned(reason or "it falls behind")
        assert loop.quality is not None
        if not math.isfinite(loop.quality):  # which would be no trial that counts, again and again
            raise self._optuna.TrialPruned(f"its quality is {loop.quality}")
        return loop.quality

    def _loop(self, recipe: Recipe, plan: Any) -> Loop:
        model = starting_point(recipe, self._train, self._seed)
        limits = Limits(epochs=recipe.settings.epochs)
        stepper = Stepper(model, recipe, plan)
        return Loop(stepper, self._train, seed=self._seed, limits=limits, watched=self._watched)

    def _follow(self, loop: Loop, trial: Any, stop: StopRequests) -> None:
        """Report each epoch's quality, and end the trial for it where it falls behind."""

        def at_report(_: object) -> None:
            place = loop.batches.place
            if place.position >= loop.batches.per_epoch and loop.quality is not None:
                trial.report(loop.quality, place.epoch)
                if trial.should_prune() and loop.done < 1.0:
                    stop.ask(_PRUNER)

        loop.on_report.append(at_report)


def _suggested(trial: Any, name: str, one: Range) -> Any:
    if one.choices:
        return trial.suggest_categorical(name, list(one.choices))
    return trial.suggest_float(name, one.low, one.high, log=one.log)


def _as_written(trial: Any) -> bool:
    return bool(trial.user_attrs.get(_WRITTEN))


def _best(recipe: Recipe, study: Any, ranges: dict[str, Range]) -> Tuned:
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    if not complete:
        raise BadInputError(
            "no trial of the hyper-parameters ended well", next_step="lower the ranges"
        )
    best = study.best_trial
    first = next((t for t in complete if _as_written(t)), None)
    values = {name: best.params[name] for name in ranges}
    same = all(
        value == getattr(recipe.settings, name)
        or (isinstance(value, float) and math.isclose(value, getattr(recipe.settings, name)))
        for name, value in values.items()
    )
    words = ", ".join(f"{name}={said(value)}" for name, value in values.items())
    changes = recipe.changes if same else "; ".join(p for p in (recipe.changes, words) if p)
    return Tuned(
        recipe=replace(recipe, settings=replace(recipe.settings, **values), changes=changes),
        values=values,
        quality=float(best.value),
        as_written=float(first.value) if first is not None else None,
        trials=sum(t.state.name in _OVER for t in study.trials),
    )
