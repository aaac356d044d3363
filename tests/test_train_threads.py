"""Denormal numbers count as zero where a plan says so, in all threads that compute."""

import pytest
import torch

from suanli.base.train_plan import TrainPlan
from suanli.training import threads
from suanli.training.forward import machine_as_planned
from suanli.training.threads import denormals_flushed

_MANY = 1 << 20  # enough elements for all threads to take part


def zeros_of_tiny_numbers() -> int:
    return int((torch.full((_MANY,), 1e-40) * 1.0 == 0).sum())


def test_flushed_in_all_threads_and_kept_again_afterwards() -> None:
    assert zeros_of_tiny_numbers() == 0
    with denormals_flushed():
        assert zeros_of_tiny_numbers() == _MANY
        with denormals_flushed():  # that of somebody else is left in force
            pass
        assert zeros_of_tiny_numbers() == _MANY
    assert zeros_of_tiny_numbers() == 0


def test_kept_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), denormals_flushed():
        _ = 1 / 0
    assert zeros_of_tiny_numbers() == 0


def test_without_the_known_pool_the_calling_thread_flushes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "parallel_region", lambda: None)
    with denormals_flushed():
        assert float(torch.tensor(1e-40) * 1.0) == 0.0
    assert float(torch.tensor(1e-40) * 1.0) > 0.0


def test_an_average_of_zero_gradients_ends_at_zero_only_under_the_plan() -> None:
    def average(plan: TrainPlan) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(64))
        optimizer = torch.optim.SGD([weight], lr=1e-3, momentum=0.9)
        with machine_as_planned(plan):
            for step in range(1200):
                weight.grad = torch.full((64,), 1.0 if step == 0 else 0.0)
                optimizer.step()
        buffer: torch.Tensor = optimizer.state[weight]["momentum_buffer"]
        return buffer

    left = average(TrainPlan())
    assert bool((left > 0).all())  # 0.9 times the smallest denormals rounds to themselves
    assert float(left.max()) < torch.finfo(torch.float32).tiny
    assert float(average(TrainPlan(flush_denormals=True)).abs().max()) == 0.0
