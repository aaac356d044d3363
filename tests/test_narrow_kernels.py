"""Convolutions of few channels with our own kernels, against float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.kernels import put_in_place, rows_for
from suanli.training.narrow import NarrowConv2d
from suanli.training.native.narrow import narrow_conv2d
from suanli.workloads.models.articles import cifar10_lenet

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
PLAN = TrainPlan(kernels=("narrow-cnn",))


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    difference = (found.detach().double() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max())


@needs_compiler
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "size", "kernel", "padding"),
    [
        *((4, 3, 6, (32, 32), 5, 0), (4, 6, 16, (14, 14), 5, 0), (1, 1, 1, (1, 1), 1, 0)),
        *((3, 2, 9, (7, 40), 3, 1), (2, 5, 3, (17, 16), 3, 2), (2, 1, 16, (33, 9), 7, 3)),
        *((5, 20, 4, (6, 6), 6, 0), (2, 3, 5, (9, 50), 2, 1), (2, 3, 5, (4, 4), 4, 3)),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_narrow_conv2d_and_its_gradients(
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    kernel: int,
    padding: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("suanli.training.native.narrow._THREADS_FROM", 0)
    torch.manual_seed(1)
    x = torch.randn(batch, inputs, *size, requires_grad=True)
    weight = torch.randn(outputs, inputs, kernel, kernel, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = narrow_conv2d(x, weight, bias, padding)
        gradient = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, weight, bias], gradient)
    finally:
        torch.set_num_threads(before)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = functional.conv2d(*exact, padding=padding)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    assert y.shape == expected.shape
    assert error(y, expected) < 2e-6
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < 2e-6


@needs_compiler
def test_nothing_is_read_or_written_beyond_the_images() -> None:
    """Infinities in the images before and behind would show."""
    torch.manual_seed(2)
    inside = torch.full((3, 2, 2, 9, 9), torch.inf)
    inside[1] = torch.randn(2, 2, 9, 9)
    weight = torch.randn(3, 2, 3, 3)
    y = narrow_conv2d(inside[1], weight, None, 1)
    torch.testing.assert_close(y, functional.conv2d(inside[1], weight, padding=1))


@needs_compiler
def test_operators_keep_torchs_rules() -> None:
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    for given in ((x, weight, bias, 1), (x, weight, None, 0)):
        torch.library.opcheck(narrow_conv2d, given, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
def test_a_network_trains_with_them_as_it_does_in_eager() -> None:
    torch.manual_seed(3)
    model = cifar10_lenet().train()
    exact = copy.deepcopy(model).double()
    twin = put_in_place(model, functional.cross_entropy, PLAN)[0]
    assert sum(isinstance(m, NarrowConv2d) for m in twin.modules()) == 2
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    x, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    functional.cross_entropy(twin(x), labels).backward()
    functional.cross_entropy(exact(x.double()), labels).backward()
    for (name, p), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert right.grad is not None
        assert error(p.grad, right.grad) < 1e-5, name


def test_what_does_not_fit() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU())
    assert "narrow-cnn" not in rows_for(wide, "cpu")
    assert "narrow-cnn" in rows_for(cifar10_lenet(), "cpu")
    assert "narrow-cnn" not in rows_for(cifar10_lenet(), "cuda:0")
    with pytest.raises(BadInputError, match="fp32"):
        put_in_place(cifar10_lenet(), functional.cross_entropy, PLAN.with_(precision="bf16"))


@needs_compiler
def test_a_model_without_such_convolutions_is_refused() -> None:
    with pytest.raises(BadInputError, match="no convolution"):
        put_in_place(nn.Sequential(nn.Conv2d(3, 32, 3)), functional.cross_entropy, PLAN)
