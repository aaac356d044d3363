"""Which kernels a work's operators become on a GPU, and what the host has to do for them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from suanli.base.work import Operator, Phase, Work
from suanli.cost.parameters import parameters
from suanli.cost.predictor import host_seconds, kernel_terms, least_ms, predict_operators
from suanli.cost.whole_kernels import parts
from suanli.cost.work_kernels import How, is_winograd, kernels_of
from suanli.devices.catalogue import catalogue
from suanli.measure.capture import capture

CARDS = {sheet.name: sheet for sheet in catalogue()}
V100, A100 = CARDS["Tesla V100 PCIe 32GB"], CARDS["A100 SXM4 40GB"]


class Loop(nn.Module):
    """An LSTM's cell called step by step, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop = nn.LSTMCell(8, 16), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16)
        for frame in x.unbind(1):
            h, c = self.cell(frame, (h, c))
        return self.drop(h)


@pytest.fixture(scope="module")
def loop() -> Work:
    return capture(Loop(), (torch.zeros(4, 3, 8),), batch=4, training=True)


def test_gates_of_a_cell_are_one_kernel(loop: Work) -> None:
    forward = [i for i, op in enumerate(loop.operators) if op.phase == "forward"]
    cells = {i: part for i, part in parts(loop.operators).items() if i in forward}
    gates = [i for i in cells if loop.operators[i].module == "cell"]
    names = [loop.operators[i].name.rstrip("_") for i in gates]
    assert names.count("sigmoid") == 9 and names.count("tanh") == 6  # three steps
    assert 1 <= sum(cells[i].first for i in gates) <= 3


def test_dropout_is_one_kernel_that_moves_less(loop: Work) -> None:
    found = parts(loop.operators)
    mine = [i for i, op in enumerate(loop.operators) if op.module == "drop" and i in found]
    assert [loop.operators[i].name.rstrip("_") for i in mine] == ["bernoulli", "div", "mul"]
    kernels = kernels_of(loop, How(dtype="fp32"))
    moved = kernels["moved"][[list(kernels["operator"]).index(i) for i in mine]]
    size = loop.operators[mine[2]].bytes_written
    assert moved.sum() == pytest.approx(2.25 * size)


def test_squeeze_and_excitation_is_no_cell() -> None:
    names = ("convolution", "relu", "convolution", "sigmoid", "mul")
    gate = [Operator(name=n, flops=4, bytes_read=4, bytes_written=4) for n in names]
    assert parts(gate) == {}


def test_host_counts_calls_of_both_passes_and_updated_tensors(loop: Work) -> None:
    p = parameters()
    kernels = kernels_of(loop, How(dtype="fp32"))
    assert kernels.updates == 4
    base = host_seconds(kernels, A100, p)
    expected = kernels.calls * p.host_forward_s + kernels.backward_calls * p.host_backward_s
    assert base == pytest.approx(expected + 4 * p.host_update_s)
    assert host_seconds(kernels, V100, p) == pytest.approx(base * p.host_generation)


def conv(side: int = 56, taps: int = 3, stride: int = 1, groups: int = 1) -> Operator:
    out, wide = side // stride, 64
    return Operator(
        name="convolution",
        flops=2 * 32 * wide * out * out * wide // groups * taps * taps,
        bytes_read=4 * 32 * wide * side * side,
        bytes_written=4 * 32 * wide * out * out,
        input_shapes=((32, wide, side, side), (wide, wide // groups, taps, taps)),
        output_shapes=((32, wide, out, out),),
        matmul=True,
    )


@pytest.mark.parametrize(
    ("more", "fast"),
    [({}, True), ({"stride": 2}, False), ({"taps": 1}, False), ({"groups": 4}, False)],
)
def test_which_convolutions_need_fewer_multiplications(more: dict[str, Any], fast: bool) -> None:
    assert is_winograd(conv(**more)) is fast


def test_fewer_multiplications_never_beat_the_speed_of_light() -> None:
    work = Work(
        operators=(conv(),) * 8, batch=32, parameters=0, parameter_bytes=0, input_bytes=0,
        output_bytes=0,
    )  # fmt: skip
    for card in CARDS.values():
        if card.memory_gb_per_s and card.flops("fp32"):
            step = predict_operators(work, card, dtype="fp32").step_ms.p50
            assert step > least_ms(work, card, dtype="fp32")


def test_short_sums_of_products_run_in_whole_slices() -> None:
    p = parameters()

    def seconds(k: int) -> float:
        op = Operator(
            name="mm", flops=2 * 2048**2 * k, bytes_read=8 * 2048 * k, bytes_written=4 * 2048**2,
            input_shapes=((2048, k), (k, 2048)), output_shapes=((2048, 2048),), matmul=True,
        )  # fmt: skip
        work = Work(
            operators=(op,), batch=1, parameters=0, parameter_bytes=0, input_bytes=0, output_bytes=0
        )
        return float(kernel_terms(kernels_of(work, How(dtype="fp32")), A100, p, "fp32")[0][0])

    whole = int(p.products["vector"].sum_slice)
    assert seconds(whole // 2) == pytest.approx(seconds(whole))
    assert seconds(whole + 1) > 1.3 * seconds(whole)
    assert seconds(64) < 0.6 * seconds(128)  # but for filling the pipeline half as long


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_bias_of_a_convolution_is_passed_over_again(phase: Phase) -> None:
    def moved(groups: int, bias: bool) -> float:
        model = nn.Sequential(
            nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, groups=groups, bias=bias)
        )
        found = capture(model, (torch.zeros(2, 8, 6, 6),), batch=2, training=True)
        one = [op for op in found.operators if op.phase == phase and "convolution" in op.name]
        of = replace(found, operators=(one[-1] if phase == "forward" else one[0],))
        return float(kernels_of(of, How(dtype="fp32"))["moved"].sum())

    result = 4 * 2 * 8 * 4 * 4
    passes = 2 if phase == "forward" else 1
    assert moved(1, True) - moved(1, False) >= passes * result
    # A thread for each result adds the bias on its way; its gradient is a sum of its own.
    own = moved(8, True) - moved(8, False)
    assert (own >= result) == (phase == "backward")


def test_autocast_leaves_tables_of_rows_in_their_own_type() -> None:
    rows = Operator(
        name="embedding", flops=2**20, bytes_read=2**22, bytes_written=2**22,
        input_shapes=((1000, 64),), output_shapes=((2**14, 64),),
    )  # fmt: skip
    work = Work(
        operators=(rows, replace(rows, phase="backward", name="embedding_dense_backward")),
        batch=1, parameters=0, parameter_bytes=0, input_bytes=0, output_bytes=0,
    )  # fmt: skip
    wide = kernels_of(work, How(dtype="fp16", autocast=True))["moved"].sum()
    assert wide == 2 * kernels_of(work, How(dtype="fp16"))["moved"].sum()


class _Attends(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_attention_written_for_ampere_reaches_less_of_a_hopper() -> None:
    """Long products come out nearly as much faster as the rate says, attention half of that."""
    attention = capture(_Attends(), (torch.zeros(8, 16, 4096, 64),), batch=8)
    product = capture(nn.Linear(8192, 8192), (torch.zeros(16384, 8192),), batch=16384)
    gains = []
    for work in (attention, product):
        old, new = (
            predict_operators(work, CARDS[name], dtype="bf16").step_ms.p50
            for name in ("A100 SXM4 80GB", "H100 SXM5 80GB")
        )
        gains.append(old / new)
    assert gains[1] > 2.0
    assert gains[0] == pytest.approx(0.35 / 0.73 * gains[1], rel=0.2)
