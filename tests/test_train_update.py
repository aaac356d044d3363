"""The optimiser's update in one native pass is torch's, value for value and state for state."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.kernels import usable
from suanli.training.native import update
from suanli.training.native.library import present
from suanli.training.step import Stepper, standard_optimizer
from tests import train_parts

pytestmark = pytest.mark.skipif(not present(), reason="there is no C compiler")

SIZES = ((1,), (15,), (16, 3), (33, 7), (300, 131))
ADAMS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"betas": (0.5, 0.9), "eps": 1e-3},
]
SGDS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
]
KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    *((update.Adam, torch.optim.Adam, options) for options in ADAMS),
    *((update.SGD, torch.optim.SGD, options) for options in SGDS),
]


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(size, generator=draw)) for size in SIZES]
    image = torch.randn(8, 3, 3, 3, generator=draw).contiguous(memory_format=torch.channels_last)
    return [*made, nn.Parameter(image)]


def give(trained: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in trained:
        gradient = torch.randn(parameter.shape, generator=draw)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for _, value in sorted(state.items())]


@pytest.mark.parametrize("ours, theirs, options", KINDS)
def test_the_same_as_torchs(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    mine, other = parameters(), parameters()
    here, there = ours(mine, lr=0.02, **options), theirs(other, lr=0.02, **options)
    for step in range(6):
        give(mine, step)
        give(other, step)
        for optimizer in (here, there):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        here.update()
        there.step()
    for a, b in zip([*mine, *states(here)], [*other, *states(there)], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    assert here.state_dict().keys() == there.state_dict().keys()


@pytest.mark.parametrize("ours, theirs, options", KINDS[::3])
def test_a_state_of_torchs_is_gone_on_with(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    other = parameters()
    there = theirs(other, lr=0.02, **options)
    for step in range(3):
        give(other, step)
        there.step()
    mine = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in other]
    here = ours(mine, lr=0.02, **options)
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    for step in range(3, 5):
        give(mine, step)
        give(other, step)
        here.update()
        there.step()
    for a, b in zip([*mine, *states(here)], [*other, *states(there)], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def odd_one(parameter: nn.Parameter, how: str) -> nn.Parameter:
    if how == "float64":
        return nn.Parameter(parameter.detach().double())
    if how == "gaps":
        wide = torch.zeros(2 * parameter.shape[0], *parameter.shape[1:])
        wide[::2] = parameter.detach()
        return nn.Parameter(wide[::2])
    return parameter


@pytest.mark.parametrize("how", ["float64", "gaps", "turned gradient", "seldom"])
@pytest.mark.parametrize("ours, theirs", [k[:2] for k in (KINDS[0], KINDS[-1])])
def test_what_the_kernel_does_not_take_is_torchs(ours: Any, theirs: Any, how: str) -> None:
    options = {"momentum": 0.9} if ours is update.SGD else {}
    sides = []
    for kind in (ours, theirs):
        trained = parameters()
        trained[3] = odd_one(trained[3], how)
        optimizer = kind(trained, lr=0.02, **options)
        for step in range(5):
            give(trained, step)
            if how == "turned gradient":
                gradient = trained[3].grad
                assert gradient is not None
                trained[3].grad = gradient.t().contiguous().t()
            if how == "seldom" and step % 2 == 0:
                trained[3].grad = None
            (optimizer.update if kind is ours else optimizer.step)()
        sides.append([*trained, *states(optimizer)])
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_one_thread_and_two_give_the_same_bits() -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trained = parameters()
            optimizer = update.Adam(trained, lr=0.02)
            for step in range(3):
                give(trained, step)
                optimizer.update()
            found.append(trained)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autograd_sees_that_weights_have_changed() -> None:
    weight = nn.Parameter(torch.ones(20))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(20)
    update.SGD([weight], lr=0.1).update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_plan_takes_it_where_it_can() -> None:
    plan = TrainPlan(optimizer_kernel="native")
    recipe = train_parts.recipe()
    stepper = Stepper(train_parts.make_model(), recipe, plan)
    assert isinstance(stepper.optimizer, update.SGD)
    settings = train_parts.recipe(optimizer="adamw", weight_decay=0.1).settings
    adam = standard_optimizer(train_parts.make_model(), settings, plan)
    assert isinstance(adam, update.Adam)
    assert adam.param_groups[0]["decoupled_weight_decay"]
    assert usable(plan) == plan
    with pytest.raises(BadInputError, match="native update is for CPUs"):
        plan.with_(device="cuda:0").checked()
    assert usable(plan.with_(device="cuda:0")).optimizer_kernel == "fused"
