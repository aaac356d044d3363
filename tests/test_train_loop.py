"""The one loop: resumed runs are the same, plans change nothing but speed, NaN is explained."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress
from suanli.training.batches import Batches
from suanli.training.checkpoints import Checkpoints
from suanli.training.checks import check_samples
from suanli.training.judging import judge
from suanli.training.loop import NotFiniteError
from suanli.training.losses import class_axis
from suanli.training.recipe import Recipe
from suanli.training.schedules import rate
from suanli.training.start import freeze, take_weights
from suanli.training.stopping import StopRequests
from suanli.workloads.record import Samples
from suanli.workloads.weights import save_weights
from tests.train_parts import data, make_model, new_loop, recipe, samples, state_of

TUNED = TrainPlan(
    memory_layout="channels_last", optimizer_kernel="fused", data="resident", keep_memory=True
)


class Average:
    """A weight average with state, as a recipe may bring one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = {n: p.detach().clone() for n, p in model.named_parameters()}

    def after_step(self, step: int, done: float) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.kept[name].lerp_(parameter, 0.2 * (1 - done) + 0.01 * (step % 2))

    def finish(self) -> None:
        self.model.load_state_dict(self.kept, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["kept"].items():
            self.kept[name].copy_(value)


def _arranged(inputs: tuple[torch.Tensor, ...], epoch: int, generator: torch.Generator) -> Any:
    noise = torch.randn(inputs[0].shape, generator=generator)
    return tuple(part + 0.05 * noise * (epoch + 1) for part in inputs)


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, TrainPlan()),
        ({"optimizer": "adamw", "lr": 0.01, "clip_norm": 0.5}, TUNED),
        ({"schedule": "cosine"}, TrainPlan(precision="bf16", prefetch=3, micro_batch=16)),
        ({"nesterov": True}, TrainPlan(precision="bf16", weights="bf16", optimizer_kernel="loop")),
        ({"optimizer": "adam", "lr": 0.01}, TrainPlan(precision="fp16")),
    ],
    ids=["plain", "tuned", "bf16-prefetch", "masters", "fp16"],
)
@pytest.mark.parametrize("at", [1, 7, 11])
def test_half_and_resumed_is_the_whole_bit_for_bit(
    changes: dict[str, Any], plan: TrainPlan, at: int, tmp_path: Path
) -> None:
    made = replace(recipe(**changes), averaging=Average)
    if changes.get("nesterov"):
        made = replace(made, arrange=_arranged)
    whole = new_loop(made, plan, steps=16)
    whole.run()
    first = new_loop(made, plan, steps=at)
    first.run()
    Checkpoints(tmp_path).save(first.step, first.state())
    torch.manual_seed(99)  # what else the process draws must not matter
    resumed = new_loop(made, plan, steps=16)
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    assert loaded.step == at
    resumed.restore(loaded.state)
    resumed.run()
    one, other = state_of(whole), state_of(resumed)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
    assert whole.epoch_losses == resumed.epoch_losses
    assert resumed.step == 16


def test_another_seed_is_another_run() -> None:
    one, other = new_loop(recipe(), seed=1, steps=3), new_loop(recipe(), seed=2, steps=3)
    one.run()
    other.run()
    assert not torch.equal(state_of(one)["model/head.weight"], state_of(other)["model/head.weight"])


@pytest.mark.parametrize(
    "plan",
    [
        TrainPlan(optimizer_kernel="fused"),
        TrainPlan(optimizer_kernel="loop"),
        TrainPlan(data="resident", memory_layout="channels_last"),
        TrainPlan(prefetch=2),
        TrainPlan(threads=1),
        TrainPlan(keep_memory=True),
    ],
    ids=lambda plan: plan.title,
)
def test_plans_give_what_the_plain_loop_gives(plan: TrainPlan) -> None:
    plain, planned = new_loop(recipe(), steps=9), new_loop(recipe(), plan, steps=9)
    plain.run()
    planned.run()
    for name, value in plain.stepper.model.state_dict().items():
        other = planned.stepper.model.state_dict()[name]
        torch.testing.assert_close(other.contiguous(), value, rtol=2e-3, atol=2e-5)


def test_micro_batches_add_up_and_only_a_mean_or_a_sum_can_be_split() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def of(loss: Callable[..., torch.Tensor]) -> Recipe:
        made = recipe(augmentation=())
        workload = replace(made.workload, make_model=net, loss=loss, untrained=False)
        return replace(made, workload=workload)

    for reduction in ("mean", "sum"):
        made = of(lambda out, y, r=reduction: functional.cross_entropy(out, y, reduction=r) / 9)
        whole = new_loop(made, steps=4)
        split = new_loop(made, TrainPlan(micro_batch=10), steps=4)
        whole.run()
        split.run()
        for name, value in whole.stepper.model.state_dict().items():
            torch.testing.assert_close(split.stepper.model.state_dict()[name], value)
        assert split.epoch_losses == pytest.approx(whole.epoch_losses, rel=1e-4)
    odd = new_loop(of(lambda out, y: functional.cross_entropy(out, y) ** 2 * len(y) ** 0.5),
                   TrainPlan(micro_batch=10), steps=1)  # fmt: skip
    with pytest.raises(BadInputError, match="neither a mean nor a sum"):
        odd.run()


def test_checkpointing_of_blocks_is_the_same_step_and_is_taken_back() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))
        return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 3))

    made = recipe(augmentation=())
    made = replace(made, workload=replace(made.workload, make_model=net, untrained=False))
    plain, light = new_loop(made, steps=3), new_loop(made, TrainPlan(checkpointing=True), steps=3)
    plain.run()
    light.run()
    light.stepper.close()
    assert not any("forward" in vars(m) for m in light.stepper.model.modules())
    for name, value in plain.stepper.model.state_dict().items():
        torch.testing.assert_close(light.stepper.model.state_dict()[name], value)
    with pytest.raises(BadInputError, match="statistics twice"):
        new_loop(recipe(), TrainPlan(checkpointing=True))


def test_prefetched_order_is_the_order() -> None:
    plain = Batches(data().train, recipe(), TrainPlan(), 3)
    ahead = Batches(data().train, recipe(), TrainPlan(prefetch=4), 3)
    for _ in range(2 * plain.per_epoch + 1):
        one, other = plain.next(), ahead.next()
        assert torch.equal(one.inputs[0], other.inputs[0])
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.after.now, other.after.now)
    ahead.close()
    assert not any(t.name == "suanli-batches" for t in threading.enumerate())


def test_a_failure_in_the_thread_reaches_the_caller() -> None:
    def broken(inputs: Any, epoch: int, generator: torch.Generator) -> Any:
        raise BadInputError("no such picture")

    batches = Batches(data().train, replace(recipe(), arrange=broken), TrainPlan(prefetch=1), 0)
    with pytest.raises(BadInputError, match="no such picture"):
        batches.next()
    batches.close()


def test_reports_and_the_end() -> None:
    loop = new_loop(recipe())
    reports: list[TrainProgress] = []
    loop.on_report.append(reports.append)
    assert loop.run() == "epochs"
    assert [r.epoch for r in reports][-1] == 4
    assert reports[-1].done == 1.0
    assert reports[-1].left_s == 0.0
    assert loop.step == 4 * 7
    assert loop.epochs_done == 4.0
    assert loop.epoch_losses[-1] < loop.epoch_losses[0]
    assert all(math.isfinite(r.loss) for r in reports)


def test_a_request_to_stop_ends_after_the_step_in_hand() -> None:
    loop, stop = new_loop(recipe()), StopRequests()
    loop.on_step.append(lambda: stop.ask() if loop.step == 5 else None)
    assert loop.run(stop) == "asked"
    assert loop.step == 5


# -- what goes wrong ---------------------------------------------------------------------------


class Explodes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)


@pytest.mark.parametrize("plan", [TrainPlan(), TrainPlan(precision="bf16", micro_batch=8)])
def test_nan_is_reported_with_step_and_operator(plan: TrainPlan) -> None:
    loop = new_loop(recipe(augmentation=()), plan)

    def sabotage() -> None:
        if loop.step == 3:
            loop.stepper.model.body[2] = Explodes()

    loop.on_step.append(sabotage)
    with pytest.raises(NotFiniteError, match=r"step 4: div in body.2 made the first") as caught:
        loop.run()
    assert caught.value.step == 4
    assert "learning rate" in str(caught.value)


def test_nan_of_the_backward_pass_is_found_at_its_operator() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x.detach() * 0 + x - x).abs().sqrt()  # infinite slope times zero at 0

    loop = new_loop(recipe(augmentation=()))
    loop.stepper.model.body[2] = Root()
    with pytest.raises(NotFiniteError, match=r"step 2: the update before it made \S+ infinite"):
        loop.run()


def test_a_rate_too_high_says_so() -> None:
    with pytest.raises(NotFiniteError, match="step"):
        new_loop(recipe(lr=1e30)).run()


def _checked(train: Samples) -> None:
    check_samples(make_model(), recipe(), train)


def test_bad_samples_are_one_clear_line() -> None:
    good = samples(20, 1)
    assert good.labels is not None
    _checked(good)
    high, nan = good.labels.clone(), good.inputs[0].clone()
    high[7], nan[4, 0, 1, 1] = 3, float("nan")
    for bad, words in (
        (replace(good, labels=high), "label 3 of number 7 .* classes 0 to 2"),
        (replace(good, labels=good.labels - 1), "label -1 of number .* out of range"),
        (replace(good, inputs=(nan,)), "number 4 .* NaN"),
        (replace(good, labels=None), "have none"),
        (replace(good, labels=good.labels[:19]), "20 training samples but 19 labels"),
        (replace(good, inputs=(good.inputs[0][:0],)), "no training samples"),
        (replace(good, inputs=(torch.zeros(20, 3, 8, 8),)), r"shape \[3, 8, 8\]"),
        (replace(good, labels=good.labels.float()), "loss does not take"),
    ):
        with pytest.raises(BadInputError, match=words) as caught:
            _checked(bad)
        assert "\n" not in str(caught.value)


def test_classes_lie_last_or_behind_the_samples() -> None:
    labels = torch.zeros(2, 5, 7, dtype=torch.long)
    assert class_axis(torch.zeros(2, 5, 7, 3), labels) == -1
    assert class_axis(torch.zeros(2, 3, 5, 7), labels) == 1
    for shape in ((2, 3), (2, 5, 7), (2, 3, 5, 6)):
        with pytest.raises(BadInputError, match="no class for each"):
            class_axis(torch.zeros(shape), labels)
    pictures = torch.randn(12, 1, 5, 7)
    masks = (pictures[:, 0] > 0).long()
    model = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        model.bias.zero_()  # type: ignore[union-attr]
    found = Samples(inputs=(pictures,), labels=masks)
    assert judge(model, found) == 1.0
    check_samples(model, recipe(), found)
    with pytest.raises(BadInputError, match="label 2 of number 0 of the training samples"):
        check_samples(model, recipe(), replace(found, labels=masks.clone().fill_(2)))


def test_plans_that_contradict_themselves() -> None:
    for changes, words in (
        ({"weights": "bf16"}, "precision bf16"),
        ({"precision": "tf32"}, "GPUs only"),
        ({"pinned": True}, "streamed to a GPU"),
        ({"compile": "reduce-overhead"}, "CUDA graphs"),
        ({"compile_scope": "step"}, "without compilation"),
        ({"micro_batch": -1}, "counts"),
        ({"precision": "int8"}, "one of fp32, tf32"),
    ):
        with pytest.raises(BadInputError, match=words):
            TrainPlan(**changes).checked()  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="no kernels 'magic'"):
        new_loop(recipe(), TrainPlan(kernels=("magic",)))


def test_schedules_go_where_they_should() -> None:
    cycle, cosine, constant = (recipe(schedule=s) for s in ("one_cycle", "cosine", "constant"))
    assert [rate(cycle, d) for d in (0.0, 0.25, 1.0)] == pytest.approx([0.1, 1.0, 0.0])
    assert [rate(cosine, d) for d in (0.0, 0.05, 1.0)] == pytest.approx([0.05, 1.0, 0.1])
    assert rate(constant, 0.7) == 1.0
    own = replace(cycle, rate=lambda done, group: 3.0 if group == "bias" else done)
    assert (rate(own, 0.5, "bias"), rate(own, 0.5)) == (3.0, 0.5)


# -- transfer ----------------------------------------------------------------------------------


def test_weights_are_taken_by_name_and_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, source = make_model(), make_model()
    with torch.no_grad():
        source.body[0].weight.fill_(0.5)  # type: ignore[union-attr, operator, index]
    source.head = nn.Linear(128, 7)
    source.extra = nn.Linear(1, 1)
    save_weights(source, tmp_path / "weights.safetensors")
    before = model.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    lines = take_weights(model, tmp_path)
    assert torch.equal(model.body[0].weight, source.body[0].weight)  # type: ignore[index]
    assert torch.equal(model.head.weight, before)  # type: ignore[arg-type]
    assert "head.bias, head.weight ([7] there, [3] here)" in lines[1]
    assert lines[-1] == "not used: extra.bias, extra.weight"
    with pytest.raises(BadInputError, match="no weights"):
        take_weights(model, tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08")
    with pytest.raises(BadInputError, match="no readable"):
        take_weights(model, tmp_path / "bad.safetensors")


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    made = recipe()
    loop = new_loop(made, steps=3)
    model = make_model()
    assert freeze(model, ("body.*",)) == 8 * 9 + 8 + 16
    from suanli.training.loop import Limits, Loop
    from suanli.training.step import Stepper

    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loop = Loop(Stepper(model, made, TUNED), data().train, seed=0, limits=Limits(epochs=1))
    loop.run()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {"head.weight", "head.bias"}
    with pytest.raises(BadInputError, match="matches no parameter"):
        freeze(model, ("tail.*",))
    with pytest.raises(BadInputError, match="nothing to train"):
        freeze(model, ("*",))
