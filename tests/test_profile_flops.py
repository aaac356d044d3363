"""Operations of a step as it runs, beside torch's own counter: where it is right, and where not."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import suanli
from suanli.base.work import Operator
from suanli.measure.step_record import record_step
from tests.profile_parts import ceilings


def torchs(step: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def ours(step: Callable[[], object], *models: nn.Module) -> tuple[int, list[Operator]]:
    """Operations of the matrix products, which are all that torch's counter counts."""
    operators = record_step(lambda _: step(), models).operators
    return sum(op.flops for op in operators if op.matmul), operators


def inference(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def step() -> None:
        model(*inputs)

    return step


def training(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        out = model(*inputs)
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()

    return step


IMAGES = torch.randn(2, 3, 16, 16)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


@pytest.mark.parametrize("step_of", [inference, training])
def test_convolutions_and_products_agree(step_of) -> None:
    model = convolutional()
    step = step_of(model, IMAGES)
    assert ours(step, model)[0] == torchs(step) > 0


def test_torchs_counts_weight_gradients_of_groups_too_often() -> None:
    model = nn.Conv2d(8, 16, 3, groups=2)
    step = training(model, torch.randn(2, 8, 16, 16))
    forward = 2 * 2 * 16 * 14 * 14 * 4 * 9
    assert ours(step, model)[0] == 2 * forward, "the images need no gradient"
    assert torchs(step) == forward + 2 * forward, "the weights' gradient once for each group"


def test_under_autocast_they_agree_and_conversions_are_seen() -> None:
    model = convolutional()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(IMAGES)

    total, operators = ours(step, model)
    assert total == torchs(step)
    assert {op.dtype for op in operators if op.matmul} == {"bf16"}
    assert any(op.name == "_to_copy" for op in operators)


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


HEADS = tuple(torch.randn(2, 4, 32, 16) for _ in range(3))
FORWARD = 2 * (2 * 2 * 4 * 32 * 32 * 16)


def test_attention_on_a_cpu_is_missing_in_torchs() -> None:
    step = inference(Attention(), *HEADS)
    assert torchs(step) == 0, "torch has learnt to count it: say so in docs/profile.md"
    assert ours(step)[0] == FORWARD


def test_the_backward_pass_of_attention_is_missing_too() -> None:
    heads = tuple(h.clone().requires_grad_() for h in HEADS)
    step = training(Attention(), *heads)
    assert torchs(step) == 0
    # of the gradients of value, scores, query and key
    assert ours(step)[0] == FORWARD + 2 * FORWARD


def test_recurrent_layers_are_missing_in_torchs() -> None:
    model = nn.LSTM(16, 32, batch_first=True)
    step = inference(model, torch.randn(4, 10, 16))
    total, operators = ours(step, model)
    assert torchs(step) < total
    assert [op.name for op in operators if op.matmul] == ["lstm"]
    assert total == 4 * 10 * 2 * 4 * (16 * 32 + 32 * 32)


def test_recomputation_counts_as_often_as_it_runs() -> None:
    block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(8, 32, requires_grad=True)

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    plain, _ = ours(training(block, x), block)
    model = Recomputed()
    again, operators = ours(training(model, x), model)
    one = 2 * 8 * 32 * 32
    # torch stops when it has all that it needs: the last product's result is not needed
    assert (plain, again) == (6 * one, 7 * one)
    assert again == torchs(training(model, x)), "here both are right"
    inside = [op for op in operators if op.name == "addmm" and op.phase == "forward"]
    assert [op.module for op in inside] == ["block.0", "block.2", "block.0"]


def test_our_own_training_kernels_are_counted() -> None:
    from suanli.training.native.convolution import conv2d

    images = torch.randn(2, 32, 8, 8, requires_grad=True)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)

    def step() -> None:
        conv2d(images, weight, None, 1).float().sum().backward()

    def plain() -> None:
        torch.conv2d(images, weight, None, 1, 1).sum().backward()

    total, operators = ours(step)
    assert total == ours(plain)[0] == torchs(plain)
    assert [op.name for op in operators if op.matmul] == ["conv2d", "conv2d_backward"]


def test_what_is_loaded_is_not_counted() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def run(begin) -> None:
        begin(None)
        torch.mm(x, x.t())
        begin("forward")
        layer(x)

    (operator,) = [op for op in record_step(run, [layer]).operators if op.matmul]
    assert operator.name == "addmm"


def test_values_that_are_read_back_are_noted_with_their_line() -> None:
    def step() -> None:
        for row in torch.ones(5):
            row.item()

    record = record_step(lambda _: step(), [])
    assert len(record.read_backs) == 5
    assert {line.partition(":")[0] for line in record.read_backs} == {"test_profile_flops.py"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_shortcut_for_encoder_layers_has_all_the_work_of_a_layer(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ceilings()
    monkeypatch.setattr("suanli.measure.ceilings.ceilings", lambda *_, **__: found)
    monkeypatch.setattr("suanli.profiling.measuring._WARM_SECONDS", 0.05)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    result = suanli.profile(model, torch.randn(4, 32, 64), steps=3, device="cpu")
    rows = [row for row in result.operators if row.name == "transformer_encoder_layer"]
    assert {row.module for row in rows} == {"layers.0", "layers.1"}
    assert all(row.source.startswith("test_profile_flops.py:") for row in rows)
    assert "layer_norm" in " ".join(rows[0].fused)
    assert sum(row.flops for row in result.operators) == result.flops
    # per layer and token: four products of 64 x 64, two of 64 x 128, and all pairs twice
    products = 2 * 4 * 32 * (4 * 64 * 64 + 2 * 64 * 128 + 2 * 32 * 64)
    assert all(products <= row.flops <= 1.05 * products for row in rows)
