"""What is refused leaves nothing; what fails on the way keeps every step that was done."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import suanli
from suanli.base import events_log
from suanli.base.errors import BadInputError, SuanliError
from suanli.base.train_plan import TrainPlan
from suanli.training.checkpoints import Checkpoints, newest_whole
from suanli.training.sgd import SGD
from suanli.workloads.record import Data, Samples
from tests.train_parts import recipe

_LOSS = functional.cross_entropy
_X = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
_LABELS = (_X[:, 0] > 0).long()


def _train(
    out: Path, *, model: Any = None, data: Any = None, loss: Any = _LOSS, **more: Any
) -> Any:
    options = {"plan": "default", "batch": 16, "epochs": 2, "lr": 0.1} | more
    model = model if model is not None else nn.Linear(8, 2)
    return suanli.train(model, (_X, _LABELS) if data is None else data, loss, out=out, **options)


def _left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Drawing(nn.Linear):
    """Draws what no graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x * (1.0 + 1e-3 * float(torch.rand(()))))
        return found


# -- what never began ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"data": (_X, _LABELS + 1)},
        {"data": (_X.index_fill(0, torch.tensor([3]), float("nan")), _LABELS)},
        {"data": (_X[:, :5], _LABELS)},
        {"loss": lambda output, labels: output},
        {"plan": TrainPlan(kernels=("attention",))},
        {"plan": TrainPlan(compile="default", compile_scope="joint"), "model": Drawing(8, 2)},
        {"loss": lambda output, labels: _LOSS(output.detach(), labels)},
        {"on_nan": "rollback", "loss": lambda output, labels: _LOSS(output.detach(), labels)},
        {"freeze": ("nothing*",)},
    ],
    ids=["labels", "nan", "shape", "loss", "kernels", "joint", "detached", "rollback", "freeze"],
)
def test_what_is_refused_leaves_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    more = {"key": tmp_path / "keys" / "k"} if "loss" not in given else {}
    with pytest.raises(BadInputError):
        _train(tmp_path / "runs" / "one", backup=tmp_path / "copies", **more, **given)
    assert _left(tmp_path) == (["keys", "keys/k"] if (tmp_path / "keys").exists() else [])
    if "plan" not in given:
        assert not (tmp_path / "keys").exists()  # a key is made when a run begins


def test_what_is_refused_leaves_what_was_there(tmp_path: Path) -> None:
    _train(tmp_path / "one", epochs=1)
    (tmp_path / "empty").mkdir()
    before = _left(tmp_path)
    events = events_log.path_of(tmp_path / "one").read_bytes()
    with pytest.raises(BadInputError, match="holds a run"):
        _train(tmp_path / "one")
    with pytest.raises(BadInputError, match="does not take samples"):
        _train(tmp_path / "one", data=(_X[:, :5], _LABELS), resume=True)
    with pytest.raises(BadInputError, match="attention"):
        _train(tmp_path / "empty", plan=TrainPlan(kernels=("attention",)))
    assert _left(tmp_path) == before
    assert events_log.path_of(tmp_path / "one").read_bytes() == events


def test_a_study_of_data_that_cannot_be_used_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(BadInputError, match="out of range"):
        _train(tmp_path / "one", data=(_X, _LABELS + 1), tune=2)
    assert _left(tmp_path) == []


def test_a_sample_is_named_by_its_place_in_the_owners_data(tmp_path: Path) -> None:
    for row in (0, 57, 119):  # whichever part it falls into
        labels = _LABELS.clone()
        labels[row] = 7
        with pytest.raises(BadInputError, match=rf"label 7 of sample {row} of the data set is out"):
            _train(tmp_path / "one", data=(_X, labels))
        with pytest.raises(BadInputError, match=rf"sample {row} of the data set holds NaN"):
            _train(
                tmp_path / "one",
                data=(_X.index_fill(0, torch.tensor([row]), float("nan")), _LABELS),
            )
    parts = [Samples(inputs=(_X,), labels=_LABELS + shift) for shift in (0, 1, 0)]
    given = Data(train=parts[0], search=parts[1], acceptance=parts[2])
    first = int((_LABELS == 1).nonzero()[0])
    with pytest.raises(BadInputError, match=rf"label 2 of number {first} of the search samples"):
        _train(tmp_path / "one", data=given)


def test_samples_know_where_they_were_taken_from() -> None:
    whole = Samples(inputs=(_X,), labels=_LABELS)
    assert whole.index(5) is None
    part = whole.part(torch.tensor([9, 4, 7])).part(slice(1, None))
    assert [part.index(row) for row in range(2)] == [4, 7]
    assert whole.part(slice(4, 10, 2)).index(1) == 6
    assert whole.part(_LABELS == 1).index(0) == int((_LABELS == 1).nonzero()[0])


# -- what fails on the way ----------------------------------------------------------------------


class Failing(nn.Module):
    """Fails in a training step, or an evaluation, behind what a step changes before its update."""

    fails_at = 0
    in_training = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(x))
        if self.training is type(self).in_training:
            self.calls += 1
            if self.calls == type(self).fails_at:
                raise KeyError("a hole in the table")
        found: torch.Tensor = self.head(x)
        return found


def _weights(run: Any) -> dict[str, torch.Tensor]:
    return dict(run.model.state_dict())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_forward_costs_no_step_that_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    torch.manual_seed(0)
    begun, whole, again = Failing(), Failing(), Failing()
    for model in (whole, again):
        model.load_state_dict(begun.state_dict())
    plan = TrainPlan(prefetch=prefetch)
    expected = _weights(_train(tmp_path / "whole", model=whole, plan=plan))
    out = tmp_path / "one"
    monkeypatch.setattr(Failing, "fails_at", 10)
    words = (
        r"step 10: KeyError: 'a hole in the table', at test_train_refused.py:\d+ "
        r"\(--resume -o .*one goes on behind step 9\)"
    )
    with pytest.raises(SuanliError, match=words) as caught:
        _train(out, model=begun, plan=plan)
    assert isinstance(caught.value.__cause__, KeyError)
    kept = newest_whole(out / "checkpoints")
    assert kept is not None and kept.name == "step-000000009"
    end = events_log.read(events_log.path_of(out))[-1].end
    assert end is not None and (end.state, end.error[:8]) == ("failed", "step 10:")
    monkeypatch.setattr(Failing, "fails_at", 0)
    run = _train(out, model=again, plan=plan, resume=True)
    assert run.result.resumed_from == 9
    for name, tensor in _weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def test_an_error_while_judging_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "in_training", False)
    monkeypatch.setattr(Failing, "fails_at", 4)  # three looks at the parts of the data came before
    with pytest.raises(SuanliError, match=r"'a hole in the table'.*goes on behind step \d"):
        _train(tmp_path / "one", model=Failing())


def test_an_error_in_the_first_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "fails_at", 1)
    with pytest.raises(SuanliError, match=r"^step 1: KeyError: .*:\d+$"):
        _train(tmp_path / "one", model=Failing())
    assert _left(tmp_path) == []


def test_after_an_error_in_an_update_only_checkpoints_before_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = TrainPlan(optimizer_kernel="loop"), tmp_path / "one"
    step, calls = SGD.step, list[int]()

    def broken(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("half an update")
        return step(*given)

    monkeypatch.setattr(SGD, "step", broken)
    words = r"^step 3: RuntimeError: half an update, at test_train_refused.py:\d+"
    with pytest.raises(SuanliError, match=words + "$"):
        _train(out, plan=plan)
    assert newest_whole(out / "checkpoints") is None
    calls.clear()
    with pytest.raises(SuanliError, match=words + r" \(--resume .* behind step 2\)$"):
        _train(tmp_path / "two", plan=plan, checkpoint_s=1e-9)


# -- state that no checkpoint could hold ----------------------------------------------------------


class Counting:
    """An average that averages nothing, and counts the steps in what `count` gives."""

    def __init__(self, count: Callable[[int], Any]) -> None:
        self.count, self.steps = count, 0

    def after_step(self, step: int, done: float) -> None:
        self.steps += 1

    def finish(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [{"steps": self.count(self.steps)}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["deep"][0]["steps"]


def _counted(out: Path, count: Callable[[int], Any], **more: Any) -> Any:
    made = replace(recipe(epochs=1), averaging=lambda model: Counting(count), **more)
    return suanli.train(made, plan="default", device="cpu", out=out)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    out = tmp_path / "one"
    assert _counted(out, np.int64).result.steps == 7
    loaded = Checkpoints(out / "checkpoints").load()
    assert loaded is not None
    assert loaded.state["averaging"] == {"deep": [{"steps": 7}]}
    assert type(loaded.state["averaging"]["deep"][0]["steps"]) is int


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({1}, "a set"),
        (torch.float32, "a dtype"),
        (np.arange(3), "a ndarray"),
        (np.complex64(1), "a complex"),
        ({(1, 2): 3}, "a tuple as a key"),
        (torch.eye(3).to_sparse(), "a tensor of torch.sparse_coo, torch.float32"),
        (torch.zeros(3, dtype=torch.complex128), "a tensor of torch.strided, torch.complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("since", [0, 1], ids=["at once", "after a step"])
def test_a_state_that_cannot_be_saved_is_refused_early(
    tmp_path: Path, bad: Any, words: str, since: int
) -> None:
    with pytest.raises(BadInputError) as caught:
        _counted(tmp_path / "one", lambda step: bad if step >= since else step)
    assert str(caught.value).startswith(f"averaging/deep/0/steps: {words} cannot be saved (")
    assert _left(tmp_path) == []


@pytest.mark.parametrize("how", ["a set", "an error"])
def test_weights_are_kept_though_the_last_checkpoint_is_not(tmp_path: Path, how: str) -> None:
    def count(step: int) -> Any:
        if step < 3:
            return step
        return {step} if how == "a set" else [][step]

    run = _counted(tmp_path / "one", count)
    assert run.result.steps == 7
    assert (tmp_path / "one" / "weights.safetensors").is_file()
    (note,) = (note for note in run.result.notes if "checkpoint" in note)
    wanted = "averaging/deep/0/steps: a set cannot be saved" if how == "a set" else "IndexError: "
    assert note.startswith(f"no checkpoint at step 7: {wanted}")
