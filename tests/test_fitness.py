"""Example inputs, labelled data and shapes of outputs: looked at before any work is done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import suanli
from suanli.base.errors import BadInputError, CaptureError
from suanli.engines.fitness import check_data
from suanli.engines.program import capture
from suanli.workloads.record import Data, Inputs, Samples
from tests.test_labels import signature

pytestmark = pytest.mark.usefixtures("quick_search", "in_process")
QUICK: dict[str, Any] = {"budget_s": 14.0, "max_batch": 4, "backends": ("eager",), "keep": True}


class Recurrent(nn.Module):
    """Two layers: at two samples the state's first dimension is the batch's by chance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, (h, _) = self.lstm(x)
        return y, h


class NotExported(Recurrent):
    """The same where no graph can be made."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.sum().item() > 1e9:
            return x, x
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("model", [Recurrent(), NotExported()])
def test_the_batch_is_found_by_meaning_not_by_size(model: nn.Module, tmp_path: Path) -> None:
    program = capture(
        model,
        Inputs(args=(torch.randn(2, 7, 6),)),
        folder=tmp_path,
        name="lstm",
        max_batch=4,
    )
    assert program.meta.exported == (type(model) is Recurrent)
    assert [spec.shape for spec in program.signature.outputs] == [(-1, 7, 5), (2, -1, 5)]
    assert [spec.batched for spec in program.signature.outputs] == [True, False]


class Flattened(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2)


class Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


@pytest.mark.parametrize("model", [Flattened(), Pairs()])
def test_other_sizes_that_follow_the_batch_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="output0 is"):
        capture(
            model,
            Inputs(args=(torch.randn(2, 6),)),
            folder=tmp_path,
            name="net",
            max_batch=4,
        )


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_a_state_beside_the_answer_is_optimised() -> None:
    model = Recurrent()
    with suanli.optimize(model, torch.randn(3, 7, 6), **QUICK) as engine:
        for batch in (1, 2, 3, 4):
            x = torch.randn(batch, 7, 6)
            with torch.no_grad():
                wanted = model(x)
            for mine, theirs in zip(engine(x), wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02)
        with pytest.raises(BadInputError, match="output1 is one for a whole call"):
            engine(torch.randn(9, 7, 6))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.free(self.frozen(x)) @ table.T


def test_the_users_model_is_as_it_was_also_after_an_error() -> None:
    model = Parts().train()
    model.frozen.eval()
    with pytest.raises(BadInputError, match=r"x \[4, 8\], table \[16, 8\]") as caught:
        suanli.optimize(model, (torch.randn(4, 8), torch.randn(16, 8)), **QUICK)
    assert "\n" not in str(caught.value)
    assert model.training
    assert model.free.training
    assert not model.frozen.training


def test_inputs_with_nan_are_bad_input() -> None:
    inputs = torch.zeros(2, 8)
    inputs[1, 3] = float("nan")
    with pytest.raises(BadInputError, match="input holds NaN in 1 of 16"):
        suanli.optimize(nn.Linear(8, 8), inputs, **QUICK)


def part(n: int, label: int = 0, labels: bool = True) -> Samples:
    return Samples(
        inputs=(torch.zeros(n, 4),),
        labels=torch.full((n,), label) if labels else None,
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Data(train=part(3), search=part(3, 999), acceptance=part(3)), "label 999 of the search"),
        (Data(train=part(3), search=part(3), acceptance=part(3, 4)), "4 classes, 0 to 3"),
        (Data(train=part(3), search=part(3), acceptance=part(3, -1)), "label -1"),
        (Data(train=part(0), search=part(3), acceptance=part(3)), "the train part"),
        (Data(train=part(3), search=part(0), acceptance=part(3)), "the search part"),
        (Data(train=part(3), search=part(3), acceptance=part(0)), "the acceptance part"),
        (Data(train=part(3), search=part(3, labels=False), acceptance=part(3)), "no labels"),
    ],
)
def test_data_that_cannot_judge_is_refused(data: Data, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        check_data(data, "accuracy", signature(dynamic=True, max_batch=4))


def test_sound_data_passes() -> None:
    sound = Data(train=part(3), search=part(3, 3), acceptance=part(3))
    check_data(sound, "accuracy", signature(dynamic=True, max_batch=4))
    unlabelled = Data(
        train=part(3, labels=False),
        search=part(3, labels=False),
        acceptance=part(3, labels=False),
    )
    check_data(unlabelled, "ranking_agreement", signature(dynamic=True, max_batch=4))
