"""Hyper-parameters are searched within their ranges, from what was kept, and never to the worse."""

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from suanli.base.errors import BadInputError, MissingBackendError
from suanli.base.events import Event, ignore
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.loop import Loop
from suanli.training.recipe import Range
from suanli.training.tune import default_ranges, tune
from suanli.workloads.record import Data, Samples
from tests.train_parts import ask_to_stop, recipe

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"


def test_a_study_finds_a_better_rate_and_is_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    slow = recipe(lr=1e-5, epochs=2, schedule="constant")
    slow = replace(slow, ranges={"lr": Range(low=1e-6, high=0.5, log=True)})
    events: list[Event] = []
    study = tmp_path / "study.db"
    found = tune(slow, 5, study, seed=0, device="cpu", listener=events.append)
    assert found.trials == 5
    assert len(events) == 5
    assert found.as_written is not None
    assert found.quality > found.as_written
    assert 1e-6 <= found.values["lr"] <= 0.5
    assert found.recipe.settings.lr == found.values["lr"]
    assert "lr=" in found.recipe.changes
    more = tune(slow, 6, study, seed=0, device="cpu", listener=ignore)
    assert more.trials == 6
    assert more.quality >= found.quality
    again = tune(slow, 6, study, seed=0, device="cpu", listener=ignore)
    assert (again.trials, again.values) == (6, more.values)


def test_settings_in_words_and_a_second_call_that_draws_anew(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    made = recipe(epochs=1)
    made = replace(made, ranges={"schedule": Range(choices=("one_cycle", "constant"))})
    found = tune(made, 2, tmp_path / "words.db", seed=0, device="cpu", listener=ignore)
    assert found.values["schedule"] in ("one_cycle", "constant")
    made = replace(made, ranges={"lr": Range(low=1e-3, high=0.1, log=True)})
    for trials in (3, 5):
        tune(made, trials, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)
    study = optuna.load_study(study_name=made.name, storage=f"sqlite:///{tmp_path / 's.db'}")
    rates = [t.params["lr"] for t in study.trials]
    assert len(set(rates)) == 5


def test_settings_as_written_come_first_also_after_a_stop_in_their_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    made = recipe(epochs=1)
    study = tmp_path / "s.db"

    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune(made, 2, study, seed=0, device="cpu", listener=ignore)
    found = tune(made, 1, study, seed=0, device="cpu", listener=ignore)
    assert (found.trials, found.values["lr"]) == (1, made.settings.lr)
    assert found.as_written == found.quality


def test_rates_that_explode_are_no_trials_that_count(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    wild = replace(recipe(epochs=1), ranges={"lr": Range(choices=(1e30, 1e31))})
    wild = replace(wild, settings=replace(wild.settings, lr=1e30))
    with pytest.raises(BadInputError, match="no trial"):
        tune(wild, 2, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)
    with pytest.raises(BadInputError, match="'warmth' is no hyper-parameter"):
        odd = replace(recipe(), ranges={"warmth": Range()})
        tune(odd, 1, tmp_path / "t.db", seed=0, device="cpu", listener=ignore)


def _judged_as(
    monkeypatch: pytest.MonkeyPatch, judged: Callable[[Loop], float | None], *, last: bool = False
) -> None:
    """Let the loop judge as told; `last`: only what is judged behind the training."""
    real = Loop.judged

    def instead(self: Loop, samples: Samples) -> float | None:
        return real(self, samples) if last and self._running else judged(self)

    monkeypatch.setattr(Loop, "judged", instead)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_quality_that_is_no_number_is_no_trial_that_is_made_for_ever(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    _judged_as(monkeypatch, lambda _: value)
    events: list[Event] = []

    def told(event: Event) -> None:
        events.append(event)
        assert len(events) < 5, "it goes on for ever"

    with pytest.raises(BadInputError, match="no trial"):
        tune(recipe(epochs=1), 2, tmp_path / "s.db", seed=0, device="cpu", listener=told)
    study = optuna.load_study(study_name="stripes", storage=f"sqlite:///{tmp_path / 's.db'}")
    assert [t.state.name for t in study.trials] == ["PRUNED", "PRUNED"]


def test_labels_of_the_watched_part_are_looked_at_first(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    inputs, labels = torch.randn(40, 4), torch.randn(40, 1)
    part = Samples(inputs=(inputs,), labels=labels)
    broken = Samples(inputs=(inputs,), labels=torch.full((40, 1), math.nan))
    workload = replace(
        recipe().workload,
        name="line",
        make_model=lambda: nn.Linear(4, 1),
        data=lambda: Data(train=part, search=broken, acceptance=part),
        loss=nn.functional.mse_loss,
    )
    made = replace(recipe(augmentation=(), epochs=1), workload=workload)
    with pytest.raises(BadInputError, match="number 0 of the search samples holds NaN"):
        tune(made, 2, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)


@pytest.mark.parametrize("cut_short", [True, False])
def test_one_ctrl_c_in_a_last_judgement_ends_the_search(
    cut_short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")

    def judged(loop: Loop) -> float | None:
        ask_to_stop(signal.SIGINT)
        return None if cut_short else 0.5

    _judged_as(monkeypatch, judged, last=True)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe(epochs=1), 2, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)
    monkeypatch.undo()
    found = tune(recipe(epochs=1), 1, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)
    assert found.trials == 1  # what was cut short is no trial that counts


def test_ctrl_c_is_not_taken_for_falling_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")

    def behind(self: object) -> bool:
        ask_to_stop(signal.SIGINT)
        return True

    monkeypatch.setattr(optuna.Trial, "should_prune", behind)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe(epochs=2), 2, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)


def test_without_ranges_the_rate_and_the_decay_are_searched() -> None:
    ranges = default_ranges(recipe())
    assert ranges["lr"] == Range(low=0.005, high=0.5, log=True)
    assert ranges.keys() == {"lr", "weight_decay"}
    assert default_ranges(recipe(weight_decay=0.0)).keys() == {"lr"}


def test_the_run_after_it_takes_the_best(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    notes: list[str] = []
    options = TrainOptions(
        out=tmp_path / "run", plan="default", device="cpu", tune=2, epochs=1, seed=3
    )
    result = train_workload(REF, options, on_event=lambda e: notes.append(e.text))
    assert any("2 settings tried, the best: lr" in note for note in notes)
    assert any("2 settings tried" in note for note in result.notes)
    assert (tmp_path / "run-tune" / "study.db").is_file()
    assert result.steps == 7


def test_without_optuna_the_install_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'suanli\[tune\]'"):
        tune(recipe(), 1, tmp_path / "s.db", seed=0, device="cpu", listener=ignore)
