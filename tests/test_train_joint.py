"""Forward pass, loss and backward pass as one graph."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.forward import Forward
from suanli.training.joint import JointGraph

PLAN = TrainPlan(compile="default", compile_scope="joint")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs run as they were traced: the same values, and no compiler is needed."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _inputs: graph)


class Net(nn.Module):
    """With statistics, a frozen parameter and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.ones(3))
        self.conv.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3)))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 8, 8), torch.randint(0, 3, (count,))


def gradients(forward: Forward, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    for p in forward.model.parameters():
        p.grad = None
    return forward.gradients((x,), y, scale)


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, b), c in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)


@pytest.mark.usefixtures("uncompiled")
def test_it_computes_what_autograd_computes() -> None:
    torch.manual_seed(0)
    model = Net().train()
    plain = copy.deepcopy(model)
    loss = nn.CrossEntropyLoss()
    joint, eager = Forward(model, loss, PLAN), Forward(plain, loss, TrainPlan())
    for count in (6, 6, 2):  # the last batch of an epoch is smaller
        x, y = batch(count)
        assert float(gradients(joint, x, y)) == pytest.approx(float(gradients(eager, x, y)))
        same(model, plain)
    assert int(model.norm.num_batches_tracked) == 3  # what was traced with does not count
    assert model.idle.grad is None
    with torch.no_grad():
        model.head.weight.mul_(2)  # an update between two steps
        plain.head.weight.mul_(2)
    x, y = batch()
    gradients(joint, x, y, 0.5)
    gradients(eager, x, y, 0.5)
    same(model, plain)
    joint.gradients((x,), y)  # adds to what is there
    eager.gradients((x,), y)
    same(model, plain)


class Sums(nn.Module):
    """Two parameters with one gradient, and one whose gradient is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x[0] * self.a + (self.b + self.c)


@pytest.mark.usefixtures("uncompiled")
def test_no_two_gradients_share_memory() -> None:
    model = Sums().train()
    joint = Forward(model, lambda out, y: out.sum(), PLAN)
    x, y = torch.randn(1, 4), torch.zeros(1)
    gradients(joint, x, y)
    found = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.is_contiguous() for grad in found)
    places = {grad.data_ptr() for grad in found if grad is not None} | {x.data_ptr()}
    assert len(places) == 4
    before = x.clone()
    for grad in found:
        assert grad is not None
        grad.mul_(3)  # as clipping does
    assert torch.equal(x, before)
    assert model.b.grad is not None
    assert torch.equal(model.b.grad, torch.full((4,), 3.0))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_graph_does(precision: str) -> None:
    torch.manual_seed(0)
    model = Net().train()
    plain = copy.deepcopy(model)
    plan = PLAN.with_(precision=precision)
    joint = Forward(model, nn.CrossEntropyLoss(), plan)
    eager = Forward(plain, nn.CrossEntropyLoss(), TrainPlan(precision=plan.precision))
    for _ in range(2):
        x, y = batch()
        tolerance = 1e-5 if precision == "fp32" else 3e-2
        expected = float(gradients(eager, x, y))
        assert float(gradients(joint, x, y)) == pytest.approx(expected, rel=tolerance)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            off = float((p.grad - q.grad).norm() / q.grad.norm())
            assert off < 10 * tolerance, name


class Overlapping(nn.Module):
    """Gradients that are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = (nn.Parameter(torch.randn(n)) for n in (4, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x[0] + (self.p + torch.cat([self.r, self.q]))


@pytest.mark.usefixtures("uncompiled")
def test_no_gradient_is_a_part_of_another() -> None:
    model = Overlapping().train()
    gradients(Forward(model, lambda out, y: out.square().sum(), PLAN), torch.randn(1, 4), Tensor())
    found = [p.grad for p in model.parameters()]
    assert len({g.untyped_storage().data_ptr() for g in found if g is not None}) == 3


class Undecided(nn.Module):
    """A forward that is another one from call to call."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.calls = way, nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.way == "values" and float(x.sum()) > 0:
            return self.layer(x)
        if self.way == "chance":
            return self.layer(x * random.random())
        if self.way == "rare chance" and random.random() < 1e-9:
            return self.layer(x)
        if self.way == "constant":
            return self.layer(x * torch.tensor(0.9**self.calls))
        if self.way == "count" and self.calls % 2:
            return self.layer(x).relu()
        return self.layer(-x)


@pytest.mark.parametrize("way", ["values", "chance", "rare chance", "constant", "count"])
def test_a_forward_that_changes_is_refused(way: str) -> None:
    model = Undecided(way)
    joint = JointGraph(model, nn.CrossEntropyLoss(), torch.no_grad)
    with pytest.raises(BadInputError, match="one graph"):
        joint((torch.randn(5, 4),), torch.zeros(5, dtype=torch.long))


def test_a_buffer_that_forward_replaces_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.head(x)

    joint = JointGraph(Counting(), nn.CrossEntropyLoss(), torch.no_grad)
    with pytest.raises(BadInputError, match="the place of the buffer count"):
        joint((torch.randn(5, 4),), torch.zeros(5, dtype=torch.long))


def test_what_it_excludes() -> None:
    for changes in ({"precision": "fp16", "device": "cuda:0"}, {"checkpointing": True}):
        with pytest.raises(BadInputError, match="joint"):
            PLAN.with_(**changes).checked()
    assert PLAN.with_(micro_batch=2).checked()
    assert TrainPlan.from_plan(PLAN.as_plan()) == PLAN
