"""Causes of slowness that were planted: each is what a profile names first."""

import re
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import suanli
from suanli.base.profile_results import ProfileResult
from tests.profile_parts import ceilings


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Ceilings that are planted, so that none are measured: `machine(bf16=8.0)`."""

    def set_to(**fields) -> None:
        found = ceilings(**fields)
        monkeypatch.setattr("suanli.measure.ceilings.ceilings", lambda *_, **__: found)

    monkeypatch.setattr("suanli.profiling.measuring._WARM_SECONDS", 0.05)
    set_to()
    return set_to


def first(result: ProfileResult) -> str:
    assert result.advice, result.verdict
    return result.advice[0].kind


class Slow(Dataset):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        return torch.full((32,), float(index)), index % 4


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def test_a_loader_that_sleeps(machine) -> None:
    loader = DataLoader(Slow(0.01), batch_size=8)
    found = suanli.profile(mlp(), loader, nn.functional.cross_entropy, steps=8, device="cpu")
    assert first(found) == "data"
    assert found.bound_by == "data"
    assert found.verdict.startswith("waits for data")
    assert "worker processes" in found.advice[0].change
    assert "waits" in found.advice[0].reason


class Watched(nn.Module):
    """Reads every value of its input back to look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        total = 0.0
        for row in out.detach().flatten()[:1500]:
            total += row.item()
        return out + 0.0 * total


def test_item_in_the_loop(machine) -> None:
    model, inputs = Watched().train(), torch.randn(32, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    found = suanli.profile(step, model=model, steps=8, device="cpu", batch=32)
    assert first(found) == "synchronisation"
    reason = found.advice[0].reason
    assert "1,500 values" in reason
    assert "test_profile_planted.py:" in reason


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_fp32_where_bf16_is_eight_times_faster(machine) -> None:
    machine(bf16=8.0)
    found = suanli.profile(Wide(), torch.randn(512, 1024), steps=5, batch=512, device="cpu")
    assert first(found) == "precision"
    assert found.advice[0].plan is not None
    assert found.advice[0].plan.precision == "bf16"
    assert "8.0 times" in found.advice[0].reason
    # the units are eight times as fast, and what surrounds them is not
    assert found.advice[0].expected_speedup <= 8.0


class Narrow(nn.Module):
    """Convolutions of few operations per byte: copies of layout weigh as much as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(32, 32, 1) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which neither compilers nor inference engines are installed."""
    monkeypatch.setattr("suanli.base.compiler.find_compiler", lambda: None)
    monkeypatch.setattr("suanli.profiling.advice.backends", dict)
    return


def test_channels_first_where_channels_last_wins(machine, no_engine) -> None:
    inputs = torch.randn(32, 32, 64, 64)
    found = suanli.profile(Narrow(), inputs, steps=5, batch=32, device="cpu")
    assert first(found) == "layout"
    assert found.advice[0].plan is not None
    assert found.advice[0].plan.memory_layout == "channels_last"


def test_a_batch_of_one(machine) -> None:
    machine(fp32=1e12)
    found = suanli.profile(Wide(), torch.randn(1, 1024), steps=10, device="cpu")
    assert first(found) == "batch"
    assert found.advice[0].batch == 32
    assert found.bound_by != "compute"


class Loop(nn.Module):
    """Thousands of operators on next to no data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        for _ in range(600):
            x = x * 1.0001 + 0.0001
        return x


def test_thousands_of_tiny_operators(machine) -> None:
    found = suanli.profile(Loop(), torch.randn(64, 8), batch=64, steps=5, device="cpu")
    assert first(found) == "overhead"
    assert re.search(r"1,[12]\d\d calls", found.advice[0].reason), found.advice[0].reason
    mul, add = sorted(found.operators, key=lambda row: -row.count)[:2]
    assert {mul.name, add.name} == {"mul", "add"}
    assert mul.count == add.count == 600
    assert mul.source.startswith("test_profile_planted.py:")
    assert mul.bound_by == "overhead"
