"""Parameters whose first gradient comes late, or not in each step, are updated as by a loop."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from suanli.base.train_plan import TrainPlan
from suanli.training.native.library import present
from suanli.training.sgd import SGD
from suanli.training.step import standard_optimizer
from tests.train_parts import SETTINGS, new_loop, recipe, state_of


def _trained(fused: bool, make: Callable[..., torch.optim.Optimizer]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(40, generator=draw)) for _ in range(3)]
    optimizer = make(parameters, fused=fused, foreach=None if fused else False)
    for step in range(6):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.randn(40, generator=draw)
            if (place == 1 and step < 2) or (place == 2 and step % 2 == 0):
                parameter.grad = None
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"momentum": 0.9}),
        (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
        (SGD, {}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
    ids=["momentum", "nesterov", "plain", "adam", "adamw"],
)
def test_the_fused_update_is_the_loop_s(kind: Any, options: dict[str, Any]) -> None:
    def make(parameters: Any, **more: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(parameters, lr=0.1, **options, **more)
        return made

    for one, other in zip(_trained(True, make), _trained(False, make), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_dampened_average_begins_with_the_whole_gradient() -> None:
    def make(parameters: Any, **more: Any) -> SGD:
        return SGD([p for p in parameters if p is not parameters[2]][:1],
                   lr=0.1, momentum=0.9, dampening=0.5, **more)  # fmt: skip

    torch.testing.assert_close(_trained(True, make)[0], _trained(False, make)[0])


def test_a_first_step_that_is_passed_over_leaves_no_average_undefined() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    made = standard_optimizer(nn.ParameterList([weight]), SETTINGS, TrainPlan())
    optimizer: Any = standard_optimizer(
        nn.ParameterList([weight]), SETTINGS, TrainPlan(optimizer_kernel="fused")
    )
    assert [type(one) for one in (made, optimizer)] == [SGD, SGD]
    held = [torch.full((64, 64), 7.0) for _ in range(50)]
    del held  # what memory that is not written to would hold now
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)  # as a scaler sets them
    optimizer.step()
    assert torch.equal(weight, torch.ones(64, 64))
    assert float(optimizer.state[weight]["momentum_buffer"].abs().max()) == 0.0


class Late(nn.Module):
    """[B, 1, 8, 8] -> [B, 3]; one layer joins in the third step, one is left out at random."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head, self.late, self.seldom = (nn.Linear(n, 3) for n in (64, 3, 3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(x.flatten(1))
        if self.training:
            self.calls += 1
        if int(self.calls) > 2:
            found = found + self.late(found)
        if not self.training or float(torch.rand(())) < 0.5:
            found = found + self.seldom(found)
        return found


native = pytest.mark.skipif(not present(), reason="there is no C compiler")


@pytest.mark.parametrize("kernel", ["loop", "fused", pytest.param("native", marks=native)])
@pytest.mark.parametrize("at", [1, 4])
def test_layers_that_join_late_are_trained_and_gone_on_with(kernel: Any, at: int) -> None:
    made, plan = recipe(), TrainPlan(optimizer_kernel=kernel)
    made = replace(made, workload=replace(made.workload, make_model=Late))
    plain, whole = new_loop(made, steps=8), new_loop(made, plan, steps=8)
    plain.run()
    whole.run()
    for name, value in plain.stepper.model.state_dict().items():
        torch.testing.assert_close(whole.stepper.model.state_dict()[name], value)
    first = new_loop(made, plan, steps=at)
    first.run()
    resumed = new_loop(made, plan, steps=8)
    resumed.restore(first.state())
    resumed.run()
    one, other = state_of(whole), state_of(resumed)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
