"""What is left out of a fit, how errors are worked out in the table, and what widens intervals."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.work import Operator, Phase, Work
from suanli.cost.cpu_time import Setting, bytes_anew, demand, predict_cpu_ms, seconds_of, setting
from suanli.cost.gpu_rates import first_cache_share, rates
from suanli.cost.parameters import parameters
from suanli.cost.power_draw import carried_w
from suanli.cost.predictor import predict_operators, transfer
from suanli.cost.work_kernels import How
from suanli.devices.catalogue import catalogue

CARDS = {sheet.name: sheet for sheet in catalogue()}
V100, P100 = CARDS["Tesla V100 PCIe 32GB"], CARDS["Tesla P100 PCIe 16GB"]
A100 = CARDS["A100 SXM4 40GB"]


def product(size: int, phase: Phase = "forward") -> Operator:
    return Operator(
        name="mm", phase=phase, flops=2 * size**3, bytes_read=8 * size**2,
        bytes_written=4 * size**2, input_shapes=((size, size), (size, size)),
        output_shapes=((size, size),), matmul=True,
    )  # fmt: skip


def work(*operators: Operator) -> Work:
    return Work(
        operators=operators, batch=1, parameters=0, parameter_bytes=0, input_bytes=64,
        output_bytes=64,
    )  # fmt: skip


LARGE, SMALL = work(product(4096)), work(*[product(32)] * 300)


# What is left out.


def test_a_chip_is_all_its_versions_and_no_other() -> None:
    from benchmarks.prediction import CHIPS, NEUSIGHT_CARDS, chip_of
    from benchmarks.predictor.data import of_chip

    assert {name for name, card in CARDS.items() if of_chip(card, "A100")} >= {
        "A100 PCIe 40GB", "A100 PCIe 80GB", "A100 SXM4 40GB", "A100 SXM4 80GB",
    }  # fmt: skip
    assert not of_chip(CARDS["GeForce RTX 3090 Ti"], "4090")
    assert not any(of_chip(card, "") for card in CARDS.values())
    assert [chip_of(card) for card in NEUSIGHT_CARDS] == ["P100", "V100", "T4", "A100", "A100"]
    for card in CARDS.values():
        assert sum(of_chip(card, chip) for chip in CHIPS) <= 1


@pytest.mark.parametrize("place", [None, "", "nowhere"])
def test_without_the_measurements_their_programs_end_with_one_line(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.predictor import data

    monkeypatch.chdir(tmp_path)
    (tmp_path / "measured").mkdir()  # not for want of a name
    if place is None:
        monkeypatch.delenv("SUANLI_DATA", raising=False)
    else:
        monkeypatch.setenv("SUANLI_DATA", place)
    with pytest.raises(SystemExit, match="set SUANLI_DATA to the folder of the data"):
        data.rows("neusight_bmm.csv")


def test_measurements_of_a_chip_left_out_change_nothing(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import fit_predictor as fits
    from benchmarks.predictor import data

    real, start = fits.fit, fits.unfitted()
    monkeypatch.setattr(fits, "fit", lambda *given, steps: real(*given, steps=2))
    before = fits.fit_operators(start, "T4", most=8)
    tripled = tuple(
        replace(found, seconds=found.seconds * (3.0 if found.gpu.name == "Tesla T4" else 1.0))
        for found in data.neusight_operators()
    )
    monkeypatch.setattr(data, "neusight_operators", lambda: tripled)
    assert fits.fit_operators(start, "T4", most=8) == before
    assert (
        fits.fit_operators(start, "P100", most=8)["capability"]["7.5"]
        != (before["capability"]["7.5"])
    )


def test_a_fit_starts_at_priors_alone() -> None:
    from benchmarks import fit_predictor as fits

    start = fits.unfitted()
    knobs = (*fits.OPERATOR_KNOBS, *fits.STEP_KNOBS, *fits.LINK_KNOBS, *fits.LAYOUT_KNOBS)
    for knob in (*knobs, *fits.POWER_KNOBS):
        place: Any = start
        for key in knob.path:
            place = place[key]
        assert place == knob.prior


# How errors are worked out.


def test_steps_priced_together_are_as_long_as_alone() -> None:
    from benchmarks.predictor.errors import Steps
    from benchmarks.predictor.jobs import Step

    found = [
        Step(data="x", job="x", gpu=gpu, how=How(dtype=dtype), work=of, seconds=0.01)
        for gpu, dtype, of in (
            (V100, "fp32", LARGE), (A100, "fp32", LARGE), (V100, "fp32", SMALL),
            (V100, "fp16", LARGE),
        )
    ]  # fmt: skip
    for step, error in zip(found, Steps(found).errors(parameters()), strict=True):
        answer = predict_operators(
            step.work, step.gpu, dtype=step.how.dtype, channels_last=False, autocast=False
        )
        assert math.exp(error) == pytest.approx(answer.step_ms.p50 * 1e-3 / 0.01, rel=1e-6)


def test_no_kind_of_job_is_left_far_outside_its_intervals() -> None:
    from benchmarks.predictor.lines import calibrated, line

    rng = np.random.default_rng(0)
    calm, wild = rng.normal(0.0, 0.05, 400), rng.normal(0.0, 0.3, 400)
    mixed = np.where(np.arange(400) < 100, 2.0, 0.02)
    before = {"base": 0.2}
    lines = [line(str(i), 0.1, "x", e, 0.2, {}, "base", 0.2) for i, e in enumerate((calm, wild))]
    width = calibrated(lines, before)["base"]
    assert np.mean(np.abs(wild) <= 1.645 * width) >= 0.8
    assert width < 0.3
    two_kinds = line("mixed", 0.1, "x", mixed, 0.2, {}, "base", 0.2)
    assert calibrated([two_kinds], before)["base"] < 1.3
    wide = line("wide", 0.1, "x", wild, 0.6, {}, "base", 0.2)
    assert calibrated([wide], before)["base"] < 0.05  # the card's distance explains it all


# What cards and hosts differ in.


def test_the_host_widens_what_waits_for_it() -> None:
    calm, waiting = (predict_operators(of, A100, dtype="fp32") for of in (LARGE, SMALL))
    assert waiting.idle_share > 0.5 > calm.idle_share
    assert waiting.spread > calm.spread
    assert any("waits for the host" in reason for reason in waiting.widened)
    assert not any("waits for the host" in reason for reason in calm.widened)


def test_the_farther_a_generation_the_wider() -> None:
    near, far = (
        predict_operators(LARGE, replace(A100, compute_capability=c), dtype="fp16").spread
        for c in ("9.0", "11.0")
    )
    assert far > near


def test_halved_accumulation_is_fed_more_easily() -> None:
    """The same rate is reached more fully where tensor units add up at half of theirs."""
    p = parameters()
    card = CARDS["GeForce RTX 3090"]
    plain = replace(card, name="RTX 3090 of a server")
    gain = rates(card, p, "fp16").machine.flops / rates(plain, p, "fp16").machine.flops
    fraction = p.product_fraction["tensor"]
    assert gain == pytest.approx(2.0 / (1.0 + fraction) * p.clock.raised, rel=0.02)
    vector = rates(card, p, "fp32").machine.flops / rates(plain, p, "fp32").machine.flops
    assert vector <= p.clock.raised * 1.001


def test_channels_by_themselves_run_slower_on_pascal_caches() -> None:
    assert first_cache_share(P100) == 0.29 * first_cache_share(V100)


def test_power_is_carried_over_up_to_the_limit() -> None:
    p = parameters()
    carried = carried_w(P100, p.clock, measured_w=100.0, here_w=150.0, there_w=120.0)
    assert carried == pytest.approx(80.0)
    most = carried_w(P100, p.clock, measured_w=400.0, here_w=100.0, there_w=200.0)
    assert most == pytest.approx(p.clock.limit_reached * 250.0)


def test_transfers_widen_with_the_targets_generation() -> None:
    strange = replace(A100, compute_capability="11.0")
    near = transfer(LARGE, 10.0, V100, A100, dtype="fp16")
    assert transfer(LARGE, 10.0, V100, strange, dtype="fp16").spread > near.spread


# The CPU.


def ceilings() -> Ceilings:
    device = DeviceInfo(name="cpu", title="a CPU", fingerprint="x", memory_bytes=2**34)
    items = (
        Ceiling(what="matmul", unit="FLOP/s", dtype="fp32", hardware=1e11, achieved=1e11),
        Ceiling(what="read", unit="B/s", hardware=1e10, working_set_bytes=2**31),
    )
    return Ceilings(device=device, items=items, threads=2, measured_at="")


def test_a_step_pays_for_memory_that_is_handed_out_anew() -> None:
    p = parameters().cpu

    def ms(fresh_bytes: float) -> float:
        step = work(product(512))
        return predict_cpu_ms(step, ceilings(), precision="fp32", fresh_bytes=fresh_bytes).p50

    assert ms(1e9) - ms(0.0) == pytest.approx(1e12 * p.fresh_s_per_byte)


def test_training_takes_what_it_keeps_anew() -> None:
    forward, backward = product(512), product(512, "backward")
    update = Operator(name="sgd", phase="optimizer", bytes_read=2**20, parameter_bytes=2**20)
    kept = forward.bytes_written + 2**20
    assert bytes_anew((forward, backward, update), 7.0) == kept
    assert bytes_anew((forward,), 7.0) == 7.0


def test_weights_are_brought_into_order_apart_from_the_product() -> None:
    alone = replace(convolution(64, 1), parameter_bytes=2**20)
    step = setting((alone,))
    assert step.weights_bytes == 2**20 and not step.training
    forward = demand(alone, ceilings(), "fp32", step)
    back = demand(replace(alone, phase="backward"), ceilings(), "fp32", step)
    assert forward.weights_s == pytest.approx(3 * 2**20 / 1e10)
    assert back.weights_s == pytest.approx(2 * forward.weights_s)
    plain = demand(replace(product(64), parameter_bytes=2**20), ceilings(), "fp32", step)
    assert plain.weights_s == pytest.approx(2**20 / 1e10)


def convolution(channels: int, groups: int) -> Operator:
    shape = (8, channels, 32, 32)
    weight = (64, channels // groups, 3, 3)
    return Operator(
        name="convolution", flops=2 * 8 * 64 * 32 * 32 * 9 * channels // groups,
        bytes_read=4 * math.prod(shape), bytes_written=4 * 8 * 64 * 32 * 32,
        input_shapes=(shape, weight), output_shapes=((8, 64, 32, 32),), matmul=True,
    )  # fmt: skip


def test_convolutions_pay_for_their_layout_and_one_channel_is_no_group() -> None:
    grouped = demand(convolution(64, 64), ceilings(), "fp32", Setting())
    single = demand(convolution(1, 1), ceilings(), "fp32", Setting())
    assert (grouped.kind, single.kind) == ("grouped", "convolution")
    assert grouped.layout_s == grouped.memory_s > 0.0
    assert demand(product(64), ceilings(), "fp32", Setting()).layout_s == 0.0


def test_pools_go_element_by_element_and_windows_cost() -> None:
    images, windows = (8, 16, 32, 32), (8, 16, 16, 16)
    pool = Operator(
        name="max_pool2d_with_indices", flops=math.prod(images), bytes_read=8, bytes_written=8,
        input_shapes=(images,), output_shapes=(windows, windows),
    )  # fmt: skip
    back = replace(
        pool,
        name="max_pool2d_with_indices_backward",
        phase="backward",
        input_shapes=(windows, images, windows),
        output_shapes=(images,),
    )
    forward = demand(pool, ceilings(), "fp32", Setting(training=True)).steps
    assert forward == (4 + 10) * math.prod(windows) / ceilings().threads
    assert 0.0 < demand(back, ceilings(), "fp32", Setting(training=True)).steps < forward / 4
    assert demand(product(64), ceilings(), "fp32", Setting(training=True)).steps == 0.0


def test_a_batch_norm_that_trains_looks_three_times() -> None:
    norm = Operator(name="native_batch_norm", bytes_read=3 * 2**20, bytes_written=3 * 2**20)
    still = demand(norm, ceilings(), "fp32", Setting())
    trains = demand(norm, ceilings(), "fp32", Setting(training=True))
    assert trains.memory_s == pytest.approx(still.memory_s * (3 + 2) / (1 + 2))


def test_gradients_of_convolutions_reach_less_of_the_rate() -> None:
    p = parameters().cpu
    forward = demand(convolution(64, 1), ceilings(), "fp32", Setting(training=True))
    extra = [
        seconds_of(replace(forward, backward=backward, flops=1e12), 1e11, "eager", p)
        for backward in (False, True)
    ]
    assert extra[1] / extra[0] == pytest.approx(1 / p.gradient_share, rel=0.01)
