"""Pruned weights stay zero and resume so; a student learns what its teacher knows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import suanli
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.checkpoints import Checkpoints
from suanli.training.distill import Taught, distilled
from suanli.training.prune import Masks, pruned
from suanli.training.request import TrainRequest
from suanli.training.run_folder import RunFolder
from suanli.training.trainer import Trainer
from tests.train_parts import WORKLOAD, data, new_loop, recipe, state_of


def _deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


def test_two_of_four_keeps_the_largest_along_the_inputs() -> None:
    model = _deep()
    before = model[2].weight.detach().clone()  # type: ignore[union-attr]
    masks = Masks(model, "2:4")
    after = model[2].weight.detach()  # type: ignore[union-attr]
    groups = after.movedim(1, -1).reshape(-1, 4)  # four inputs of one tap of one filter
    assert ((groups != 0).sum(1) == 2).all()
    original = before.movedim(1, -1).reshape(-1, 4).abs()
    kept = original.masked_fill(groups == 0, float("nan"))
    dropped = original.masked_fill(groups != 0, float("nan"))
    assert (kept.nan_to_num(9).min(1).values >= dropped.nan_to_num(-1).max(1).values).all()
    assert masks.sparsity == 0.5
    assert (model[0].weight != 0).all()  # type: ignore[union-attr]  # 9 weights are no groups of 4
    assert (model[6].weight != 0).all()  # type: ignore[union-attr]  # the head makes the answer


def test_a_fraction_drops_the_smallest_of_all_layers() -> None:
    model = _deep()
    weights = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 2)])  # type: ignore[union-attr]
    assert Masks(model, "0.8").sparsity == pytest.approx(0.8, abs=0.01)
    left = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 2)])  # type: ignore[union-attr]
    assert left[left > 0].min() >= weights.quantile(0.79)
    for kind in ("1.2", "0", "half", "2:8"):
        with pytest.raises(BadInputError, match="cannot prune"):
            pruned(recipe(), kind)
    with pytest.raises(BadInputError, match="no layer"):
        Masks(nn.Sequential(nn.Linear(4, 4)), "0.5")


def test_zeros_stay_through_training_and_resuming(tmp_path: Path) -> None:
    base = recipe()
    made = replace(base, workload=replace(base.workload, make_model=_deep, untrained=False))
    made = pruned(made, "2:4")
    whole, first = new_loop(made, steps=12), new_loop(made, steps=5)
    whole.run()
    first.run()
    Checkpoints(tmp_path).save(5, first.state())
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    resumed = new_loop(made, steps=12)
    resumed.restore(loaded.state)
    resumed.run()
    one, other = state_of(whole), state_of(resumed)
    assert all(torch.equal(one[n], other[n]) for n in one)
    groups = one["model/2.weight"].movedim(1, -1).reshape(-1, 4)
    assert ((groups != 0).sum(1) <= 2).all()
    assert not torch.equal(one["model/2.weight"], _deep()[2].weight)  # type: ignore[index]


def test_bf16_copies_are_pruned_too() -> None:
    made = recipe(augmentation=())
    made = pruned(replace(made, workload=replace(made.workload, make_model=_deep)), "2:4")
    loop = new_loop(made, TrainPlan(precision="bf16", weights="bf16"), steps=4)
    for _ in range(2):
        for master, low in loop.stepper.forward._copies:
            assert torch.equal(low, master.detach().bfloat16())
        loop.limits = replace(loop.limits, steps=loop.step + 2)
        loop.run()


def test_an_own_module_is_pruned_and_taught(tmp_path: Path) -> None:
    given = data().train
    both = (given.inputs[0], given.labels)
    model = _deep()
    loss = functional.cross_entropy
    run = suanli.train(
        model, both, loss, epochs=1, plan="default", device="cpu", prune="2:4", out=tmp_path / "a"
    )
    assert run.model is model
    assert ((model[2].weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1) <= 2).all()  # type: ignore[index]
    assert not run.result.as_written
    with pytest.raises(BadInputError, match="cannot prune"):
        suanli.train(_deep(), both, loss, plan="default", prune="2:8", out=tmp_path / "b")
    with pytest.raises(BadInputError, match="no-such"):
        suanli.train(_deep(), both, loss, plan="default", teacher="no-such", out=tmp_path / "c")


def test_a_student_learns_the_teacher_s_answers(tmp_path: Path) -> None:
    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x[:, 0].mean(-1)  # [B, 8]
            sums = torch.stack([rows[:, 2 * i : 2 * i + 2].sum(1) for i in range(3)], 1)
            return 5 * sums.roll(1, dims=1)  # off by one class, on purpose

    teacher = replace(WORKLOAD, name="oracle", make_model=Teacher, untrained=False)
    made = distilled(recipe(epochs=12, augmentation=()), teacher, share=1.0)
    assert made.changes == "taught by oracle"
    request = TrainRequest(plan="default", device="cpu", out=tmp_path / "run")
    result, model = Trainer(made, request, lambda event: None).run()
    images = data().acceptance.inputs[0]
    agree = (model(images).argmax(1) == Teacher()(images).argmax(1)).float().mean()
    assert agree > 0.8
    assert result.quality is not None
    assert result.quality.value < 0.3  # the labels were not looked at
    names = load_file(RunFolder(tmp_path / "run").weights).keys()
    assert names == WORKLOAD.make_model().state_dict().keys()


def test_what_cannot_teach() -> None:
    with pytest.raises(BadInputError, match="untrained"):
        distilled(recipe(), WORKLOAD)
    trained = replace(WORKLOAD, untrained=False)
    with pytest.raises(BadInputError, match="share"):
        distilled(recipe(), trained, share=0.0)
    wide = Taught(nn.Linear(4, 3), nn.Linear(4, 5)).train()
    with pytest.raises(BadInputError, match="the teacher answers"):
        wide(torch.zeros(2, 4))


def test_the_mixed_loss_is_hinton_s() -> None:
    torch.manual_seed(0)
    trained = replace(WORKLOAD, untrained=False)
    made = distilled(recipe(), trained, temperature=2.0, share=0.25)
    own, theirs, labels = torch.randn(6, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))
    output = torch.cat([own, theirs], 1).requires_grad_()
    assert made.workload.loss is not None
    p, q = (theirs / 2).softmax(1), (own / 2).softmax(1)
    apart = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.75 * functional.cross_entropy(own, labels) + 0.25 * 4 * apart
    assert float(made.workload.loss(output, labels).detach()) == pytest.approx(
        float(expected), rel=1e-5
    )
    new_loop(made, TrainPlan(optimizer_kernel="fused"), steps=2).run()


def test_a_summed_loss_has_a_summed_teacher() -> None:
    def summed(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, labels, reduction="sum")

    torch.manual_seed(0)
    trained = replace(WORKLOAD, untrained=False)
    student = replace(recipe(), workload=replace(WORKLOAD, loss=summed))
    losses = [distilled(made, trained).workload.loss for made in (recipe(), student)]
    output, labels = torch.randn(6, 6).requires_grad_(), torch.randint(0, 3, (6,))
    assert losses[0] is not None and losses[1] is not None
    mean, total = (float(loss(output, labels).detach()) for loss in losses if loss)
    assert total == pytest.approx(6 * mean, rel=1e-5)
    odd = replace(recipe(), workload=replace(WORKLOAD, loss=lambda o, t: o.square().sum().sqrt()))
    taught = distilled(odd, trained).workload.loss
    assert taught is not None
    with pytest.raises(BadInputError, match="neither a mean nor a sum"):
        taught(output, labels)


def test_a_pruned_run_is_resumed_pruned(tmp_path: Path) -> None:
    ref = f"{Path(__file__).with_name('train_parts.py')}:recipe"
    out = tmp_path / "run"
    train_workload(ref, TrainOptions(out=out, plan="default", device="cpu", epochs=1, prune="0.5"))
    again = TrainOptions(out=out, device="cpu", epochs=2, resume=True)
    result = train_workload(ref, again)
    assert (result.resumed_from, result.steps) == (7, 14)
    assert not result.as_written
    weight = load_file(out / "weights.safetensors")["body.0.weight"]
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)
