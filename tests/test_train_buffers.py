"""Buffers that change their shape or type, or come and go, are put back as they were."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import suanli
from suanli.training.batches import Place
from suanli.training.before import Before

_NOW = torch.Generator().get_state()
_PLACE = Place(epoch=0, position=0, at_start=_NOW, now=_NOW)


class Holder(nn.Module):
    """One buffer that moves among others that do not, and batch norm without any."""

    def __init__(self, first: torch.Tensor | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("still", torch.arange(3))
        self.register_buffer("moving", first)


_N, _ONE = torch.arange(5.0), torch.tensor([7.0])


@pytest.mark.parametrize(
    "values",
    [
        [_N, _ONE, _N, _N + 1, _ONE, _ONE],
        [torch.zeros(1, 8), torch.ones(16, 8), torch.ones(16, 8) * 2, torch.ones(8, 8)],
        [torch.tensor(0), torch.tensor(0.5), torch.tensor(1.5), torch.tensor(2.5)],
        [None, _N, _N + 1, None, _ONE, _N],
        [_N, None, None, _N, _N + 1, None],
        [_N, _N + 1, _N + 2, _N + 3],
    ],
    ids=["one for many", "last batch", "type", "comes", "goes", "alike"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_step_changed_is_put_back(values: list[Any], in_place: bool) -> None:
    def change(value: Any) -> None:
        held = model.moving
        if in_place and None not in (held, value) and held.dtype == value.dtype:
            held.data = value.clone()  # the same tensor, with other values
        else:
            model.moving = None if value is None else value.clone()

    model: Any = Holder(values[0])
    before = Before(model, "cpu")
    for value, coming in pairwise(values):
        # fails behind the change
        before.keep(_PLACE)
        change(coming)
        if value is not values[0]:  # the first step that is whole shows what moves
            assert before.restore() is not None
            assert (model.moving is None) == (value is None)
            if value is not None:
                assert torch.equal(model.moving, value)
                assert model.moving.dtype == value.dtype
            # and is whole
            before.keep(_PLACE)
            change(coming)
        before.stands()
    assert torch.equal(model.still, torch.arange(3))


def test_the_first_step_is_put_back_as_well() -> None:
    model: Any = Holder(None)
    before = Before(model, "cpu")
    before.keep(_PLACE)
    model.moving, model.still = _N, None
    assert before.restore() is not None
    assert model.moving is None
    assert torch.equal(model.still, torch.arange(3))


class Remembers(nn.Module):
    """Keeps the last batch, whose size varies, and from the first step on nothing in `start`."""

    last: torch.Tensor
    start: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.register_buffer("last", torch.zeros(1, 8), persistent=False)
        self.register_buffer("start", torch.zeros(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(x + 0.1 * self.last.mean(0))
        if self.training:
            self.last, self.start = x.detach().clone(), None
        return found


def test_a_module_that_keeps_its_last_batch_is_trained(tmp_path: Path) -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    run = suanli.train(
        Remembers(), (x, labels), functional.cross_entropy,
        batch=48, epochs=2, plan="default", device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    assert run.result.steps == 2 * 4
