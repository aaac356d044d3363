"""A run that is broken off at the end of an epoch goes on as if it had not been."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.base.train_results import TrainResult
from suanli.parallel.replicas import Agreed, Replicas
from suanli.training import loop as module
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.judging import judge
from suanli.training.loop import Limits, Loop
from suanli.training.run_folder import read_metrics
from suanli.training.start import starting_point
from suanli.training.step import Stepper
from suanli.training.stopping import StopRequests
from tests.train_parts import PLAIN, data, recipe, state_of

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"
STEPS, TARGET = 7, 0.01  # of an epoch of 200 samples; any quality reaches it


def _loop(*, target: float | None = TARGET, replicas: Replicas | None = None, **more: Any) -> Loop:
    made, train = recipe(**more), data().train
    stepper = Stepper(starting_point(made, train, 0), made, PLAIN, replicas)
    limits = Limits(epochs=2, target=target)
    return Loop(stepper, train, seed=0, limits=limits, watched=data().search)


def _end(loop: Loop, stop: StopRequests | None = None) -> Any:
    reason = loop.run(stop)
    return reason, loop.step, loop.epoch_losses, loop.quality


def _same(one: Loop, other: Loop) -> bool:
    left, right = state_of(one), state_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("target", [TARGET, None], ids=["target", "epochs"])
@pytest.mark.parametrize("batch", [32, 200], ids=["batches", "one batch"])
def test_from_each_step_it_comes_to_the_same_end(batch: int, target: float | None) -> None:
    whole, kept = _loop(batch=batch, target=target), list[Any]()
    whole.on_step.append(lambda: kept.append(copy.deepcopy(whole.state())))
    expected = _end(whole)
    assert expected[0] == ("epochs" if target is None else "target")
    assert all(math.isfinite(loss) for loss in expected[2])
    for state in kept:
        again = _loop(batch=batch, target=target)
        again.restore(state)
        assert _end(again) == expected
        assert _same(again, whole)


def test_a_state_of_an_epoch_that_is_open_is_ended_first() -> None:
    """Such states were saved before an epoch's end was part of its last step."""
    whole, kept = _loop(), list[Any]()
    end_epoch = whole._end_epoch

    def kept_before() -> None:
        kept.append(copy.deepcopy(whole.state()))
        end_epoch()

    whole._end_epoch = kept_before  # type: ignore[method-assign]
    expected, again = _end(whole), _loop()
    again.restore(kept[0])
    assert _end(again) == expected == ("target", STEPS, whole.epoch_losses, whole.quality)
    assert _same(again, whole)


class Pair(Replicas):
    """Two processes, of which this one does all."""

    def __init__(self) -> None:
        super().__init__(world=2)

    def share(self, count: int) -> slice:
        return slice(None)

    def exchange(self, parameters: Any, loss: torch.Tensor, **more: Any) -> Agreed:
        return Agreed(loss=loss, **more)

    def from_first(self, value: float) -> float:
        return value


@pytest.mark.parametrize("world", [1, 2])
def test_a_judgement_that_is_broken_off_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    def made() -> Loop:
        return _loop(replicas=Pair() if world == 2 else None)

    whole, first, again, stop = made(), made(), made(), StopRequests()
    expected = _end(whole)

    def asked_meanwhile(*given: Any, **more: Any) -> float:
        torch.rand(3)  # what is drawn in half a judgement must not matter
        stop.ask()
        return judge(*given, **more)

    monkeypatch.setattr(module, "judge", asked_meanwhile)
    monkeypatch.setattr(module, "_LONGEST_JUDGING_S", 0.0)
    # of several processes the request came behind the exchange of the epoch's last step
    assert _end(first, stop) == ("asked", STEPS, whole.epoch_losses, None)
    monkeypatch.setattr(module, "judge", judge)
    again.restore(copy.deepcopy(first.state()))
    assert _end(again) == expected
    assert _same(again, whole)


def test_after_an_error_in_a_judgement_it_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first, again = _loop(), _loop(), _loop()
    expected = _end(whole)

    def broken(*given: Any, **more: Any) -> float:
        raise KeyError("a hole in the table")

    monkeypatch.setattr(module, "judge", broken)
    with pytest.raises(KeyError):
        first.run()
    assert first.go_back()
    monkeypatch.setattr(module, "judge", judge)
    again.restore(copy.deepcopy(first.state()))
    assert _end(again) == expected
    assert _same(again, whole)


def test_what_a_judgement_draws_is_no_part_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = _loop(target=None), _loop(target=None)

    def drawing(*given: Any, **more: Any) -> float:
        torch.rand(3)
        return judge(*given, **more)

    whole.run()
    monkeypatch.setattr(module, "judge", drawing)
    other.run()
    assert _same(whole, other)


def test_a_part_of_an_epoch_that_was_kept_at_its_last_step_has_a_loss() -> None:
    def made() -> Loop:
        loop = _loop(target=None)
        loop.limits = Limits(epochs=2, steps=STEPS + 2)
        return loop

    whole, kept = made(), list[Any]()
    whole.on_step.append(lambda: kept.append(copy.deepcopy(whole.state())))
    expected, again = _end(whole), made()
    again.restore(kept[-1])
    assert _end(again) == expected
    assert len(again.epoch_losses) == 2


def _train(out: Path, **options: Any) -> TrainResult:
    given = TrainOptions(out=out, plan="default", device="cpu", checkpoint_s=1e-9, **options)
    return train_workload(REF, given)


@pytest.mark.parametrize("asked", [{"epochs": 1}, {"to": TARGET}], ids=["epochs", "target"])
def test_a_run_that_came_to_its_end_is_there_again(tmp_path: Path, asked: dict[str, Any]) -> None:
    out = tmp_path / "run"
    first = _train(out, **asked)
    lines = read_metrics(out / "metrics.jsonl")
    again = _train(out, resume=True, **asked)
    for result in (first, again):
        assert (result.stopped, result.steps) == (next(iter(asked)).replace("to", "target"), STEPS)
    assert math.isfinite(first.loss)
    assert again.loss == first.loss
    assert again.resumed_from == STEPS
    assert read_metrics(out / "metrics.jsonl") == lines
