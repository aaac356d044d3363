"""The plain training loop: it learns, repeats itself, stops in time and says what is wrong."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.train_results import TrainProgress
from suanli.training._allocator import kept_memory
from suanli.training.augment import augment
from suanli.training.fit import FitResult, accuracy, fit, fit_and_keep
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.resolve import resolve
from suanli.workloads.seeding import seeded
from suanli.workloads.weights import kept_weights, weight_facts

CENTRES = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32) * 2


def _samples(count: int, seed: int) -> Samples:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    points = CENTRES[labels] + draw.standard_normal((count, 8)).astype(np.float32)
    return Samples(inputs=(torch.from_numpy(points),), labels=torch.from_numpy(labels))


def _data() -> Data:
    return Data(train=_samples(300, 2), search=_samples(60, 3), acceptance=_samples(200, 4))


def _model() -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


SETTINGS = TrainingSettings(optimizer="sgd", lr=0.1, momentum=0.9, batch=32, epochs=5)
WORKLOAD = Workload(
    name="points",
    make_model=_model,
    make_inputs=lambda batch: Inputs(args=(torch.zeros(batch, 8),)),
    data=_data,
    metric="accuracy",
    loss=functional.cross_entropy,
    training=SETTINGS,
)


def _with(**changes: object) -> Workload:
    return replace(WORKLOAD, training=replace(SETTINGS, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nesterov": True, "schedule": "one_cycle", "weight_decay": 1e-3},
        {"optimizer": "adam", "lr": 0.02},
        {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.01},
        {"precision": "bf16"},
    ],
)
def test_it_learns(changes: dict[str, object]) -> None:
    reports: list[TrainProgress] = []
    result = fit(_with(**changes), progress=reports.append)
    before = accuracy(_model(), _data().acceptance)
    assert before < 0.7
    assert result.acceptance_accuracy > 0.93
    assert result.search_accuracy > 0.9
    assert len(result.epoch_losses) == 5
    assert result.epoch_losses[-1] < 0.5 * result.epoch_losses[0]
    assert result.epochs == 5
    assert [report.epoch for report in reports][-1] == 5
    assert reports[-1].done == 1.0
    assert all(a.done <= b.done for a, b in pairwise(reports))
    assert not result.model.training
    assert next(result.model.parameters()).dtype == torch.float32


def test_one_step_is_the_optimizer_s_own() -> None:
    data = _data()
    small = Samples(inputs=(data.train.inputs[0][:32],), labels=data.train.labels[:32])  # type: ignore[index]
    workload = replace(_with(epochs=1), data=lambda: replace(data, train=small), untrained=False)
    found = fit(workload).model
    expected = _model().train()
    loss = functional.cross_entropy(expected(small.inputs[0]), small.labels)  # type: ignore[arg-type]
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)  # the first step has no momentum yet
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_same_seed_same_weights_other_seed_others() -> None:
    one, same, other = (fit(WORKLOAD, seed=seed).model.state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_caller_s_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    fit(WORKLOAD, epochs=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_trained_weights_are_the_start_of_a_trained_workload() -> None:
    first = fit(WORKLOAD, epochs=3)
    weights = first.model.state_dict()

    def make_model() -> nn.Module:
        model = _model()
        model.load_state_dict(weights)
        return model

    still = replace(WORKLOAD, make_model=make_model, untrained=False)
    result = fit(replace(still, training=replace(SETTINGS, lr=0.0, epochs=1)))
    assert result.acceptance_accuracy == first.acceptance_accuracy
    fresh = fit(replace(still, untrained=True, training=replace(SETTINGS, lr=0.0, epochs=1)))
    assert fresh.acceptance_accuracy < first.acceptance_accuracy


def test_time_limit_ends_the_cycle_early() -> None:
    result = fit(_with(epochs=100_000, schedule="one_cycle"), max_seconds=0.3)
    assert result.epochs < 100_000
    assert result.acceptance_accuracy > 0.8


def test_held_out_end_is_not_trained_on() -> None:
    data = _data()
    assert data.train.labels is not None
    poisoned = data.train.labels.clone()
    poisoned[240:] = (poisoned[240:] + 1) % 3
    train = replace(data.train, labels=poisoned)
    workload = replace(_with(validation_split=0.2), data=lambda: replace(data, train=train))
    result = fit(workload)
    assert result.validation_accuracy is not None
    assert result.validation_accuracy < 0.1
    assert result.acceptance_accuracy > 0.93


def test_what_cannot_be_trained() -> None:
    with pytest.raises(BadInputError, match="no labelled data"):
        fit(replace(WORKLOAD, data=None))
    with pytest.raises(BadInputError, match="no labelled data"):
        fit(resolve("resnet18"))
    with pytest.raises(BadInputError, match="optimizer"):
        fit(_with(optimizer="lion"))
    with pytest.raises(BadInputError, match="some time"):
        fit(WORKLOAD, max_seconds=0)
    with pytest.raises(BadInputError, match="some time"):
        fit(WORKLOAD, epochs=0)
    with pytest.raises(SuanliError, match="learning rate"):
        fit(_with(lr=1e30))
    with pytest.raises(BadInputError, match="no built-in"):
        fit_and_keep(WORKLOAD)


def test_shifts_move_each_image_on_its_own_and_keep_its_pixels() -> None:
    images = torch.zeros(200, 1, 9, 9)
    images[:, 0, 4, 4] = 1.0
    moved = augment(images, ("shift2",), torch.Generator().manual_seed(0))
    places = {tuple(int(i) for i in (image[0] == 1).nonzero()[0]) for image in moved}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))


def test_flip_mirrors_about_half() -> None:
    images = torch.arange(3.0).expand(400, 1, 2, 3).contiguous()
    flipped = augment(images, ("flip",), torch.Generator().manual_seed(0))
    mirrored = flipped[:, 0, 0, 0] == 2
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    with pytest.raises(BadInputError, match="unknown augmentation"):
        augment(images, ("blur",), torch.Generator())


def test_memory_setting_is_taken_back() -> None:
    with pytest.raises(ZeroDivisionError), kept_memory() as done:
        assert isinstance(done, bool)
        torch.ones(1 << 22).sum().div(1)
        raise ZeroDivisionError
    assert torch.ones(1 << 22).sum() == 1 << 22


def test_weights_of_a_builtin_are_kept_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.workloads.builtins import digits

    images = resolve("digits-resnet", weights="none").data
    assert images is not None
    few = images()

    def first(samples: Samples, count: int) -> Samples:
        assert samples.labels is not None
        return Samples(inputs=(samples.inputs[0][:count],), labels=samples.labels[:count])

    monkeypatch.setattr(
        digits,
        "_data",
        lambda: replace(
            few,
            train=first(few.train, 64),
            search=first(few.search, 16),
            acceptance=first(few.acceptance, 32),
        ),
    )
    workload = resolve("digits-resnet", weights="none")
    assert workload.training is not None
    quick = replace(workload, training=replace(workload.training, epochs=1, batch=32))
    result, path = fit_and_keep(quick)
    assert quick.training is not None
    assert path == kept_weights("digits-resnet", quick.training)
    assert weight_facts(path)["acceptance_accuracy"] == f"{result.acceptance_accuracy:.4f}"
    again = resolve("digits-resnet", weights=path)
    assert not again.untrained
    assert accuracy(again.make_model(), first(few.acceptance, 32)) == result.acceptance_accuracy
    path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_reaches_its_target() -> None:
    workload = resolve("digits-resnet", weights="none")
    result = fit(workload)
    assert workload.target is not None
    assert result.acceptance_accuracy >= workload.target


def test_demo_says_why_its_network_is_weaker_than_meant() -> None:
    script = Path(__file__).parent.parent / "examples" / "demo.py"
    shortfall = runpy.run_path(str(script))["_shortfall"]
    workload = resolve("digits-resnet", weights="none")
    assert workload.training is not None
    done = workload.training.epochs
    result = FitResult(
        model=nn.Identity(),
        search_accuracy=0.8,
        acceptance_accuracy=0.8333,
        validation_accuracy=None,
        epochs=1.5,
        epoch_losses=(),
        seconds=70.0,
        samples_per_s=20.0,
        precision="fp32",
    )
    assert f"time ran out after 1.5 of {done} epochs" in shortfall(workload, result)
    assert "98 % was meant" in shortfall(workload, result)
    assert "time ran out" not in shortfall(workload, replace(result, epochs=float(done)))
    assert not shortfall(workload, replace(result, acceptance_accuracy=0.99))


def test_cifar_example_runs_on_official_binaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 40), ("test_batch.bin", 10)):
        records = draw.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.tobytes())
    out = tmp_path / "w.safetensors"
    script = Path(__file__).parent.parent / "examples" / "train_cifar10_resnet18.py"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 0
    assert "accuracy on the acceptance part" in capsys.readouterr().out
    assert not resolve("resnet18-cifar", weights=out).untrained
    monkeypatch.setattr(sys, "argv", [str(script), "--data", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 2


def test_label_smoothing_comes_with_the_workload_s_loss() -> None:
    loss: Callable[..., torch.Tensor] | None = resolve("digits-resnet", weights="none").loss
    assert isinstance(loss, partial)
    assert loss.keywords == {"label_smoothing": 0.1}
