"""The model of time on GPUs that are not here: behaviour that no fit may lose."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.work import Operator, Work
from suanli.cost.counts import Counts, step_of_counts_s
from suanli.cost.gpu_rates import clock_share, peak_flops, rates
from suanli.cost.kernel_time import Machine, product_s, reach
from suanli.cost.parameters import parameters
from suanli.cost.power_draw import mean_power_w, slowdown
from suanli.cost.predictor import (
    kernel_terms,
    predict_operators,
    simplest_bound_ms,
    transfer,
    waiting_s,
)
from suanli.cost.work_kernels import How, kernels_of
from suanli.devices.catalogue import catalogue

CARDS = {sheet.name: sheet for sheet in catalogue()}
A100 = CARDS["A100 SXM4 40GB"]
H100 = CARDS["H100 SXM5 80GB"]
V100 = CARDS["Tesla V100 PCIe 32GB"]
T4 = CARDS["Tesla T4"]


def product(m: int, n: int, k: int, **more: Any) -> Operator:
    return Operator(
        name="mm", flops=2 * m * n * k, bytes_read=4 * (m * k + k * n), bytes_written=4 * m * n,
        parameter_bytes=4 * k * n, input_shapes=((m, k), (k, n)), output_shapes=((m, n),),
        matmul=True, **more,
    )  # fmt: skip


def sweep(elements: int, **more: Any) -> Operator:
    return Operator(
        name="relu", flops=elements, bytes_read=4 * elements, bytes_written=4 * elements,
        input_shapes=((elements,),), output_shapes=((elements,),), **more,
    )  # fmt: skip


def work(*operators: Operator, batch: int = 1) -> Work:
    held = sum(op.parameter_bytes for op in operators)
    return Work(
        operators=operators, batch=batch, parameters=held // 4, parameter_bytes=held,
        input_bytes=4096, output_bytes=4096,
    )  # fmt: skip


BIG = work(*[product(4096, 4096, 4096), sweep(4096 * 4096)] * 4)
SMALL = work(*[product(64, 64, 64), sweep(4096)] * 200)


def ms(of: Work, gpu: GpuSheet, dtype: str = "fp16", **more: Any) -> float:
    return predict_operators(of, gpu, dtype=dtype, **more).step_ms.p50


@pytest.mark.parametrize("of", [BIG, SMALL])
def test_a_card_with_more_of_anything_is_not_slower(of: Work) -> None:
    faster = dict(A100.dense_tflops, fp16=600.0)
    better = [
        replace(A100, dense_tflops=faster),
        replace(A100, memory_gb_per_s=3000.0),
        replace(A100, l2_mb=80.0),
        replace(A100, power_w=600.0),
    ]
    for card in better:
        assert ms(of, card) <= ms(of, A100) * 1.0001


def test_more_bandwidth_helps_what_moves_bytes_and_rate_what_computes() -> None:
    wide = replace(V100, memory_gb_per_s=1800.0, power_w=400.0)
    quick = replace(V100, dense_tflops=dict(V100.dense_tflops, fp32=28.0), power_w=500.0)
    moving, computing = work(sweep(10**8)), work(product(8192, 8192, 8192))
    assert ms(moving, wide, "fp32") < 0.6 * ms(moving, V100, "fp32")
    assert ms(moving, quick, "fp32") == pytest.approx(ms(moving, V100, "fp32"))
    assert ms(computing, quick, "fp32") < 0.6 * ms(computing, V100, "fp32")
    assert ms(computing, wide, "fp32") > 0.9 * ms(computing, V100, "fp32")


def test_twice_the_work_takes_about_twice_the_time() -> None:
    twice = work(*BIG.operators, *BIG.operators)
    assert ms(twice, A100) == pytest.approx(2 * ms(BIG, A100), rel=0.02)


@pytest.mark.parametrize("gpu", list(CARDS.values()), ids=lambda g: g.name)
def test_every_card_of_the_catalogue_is_predicted_above_its_bounds(gpu: GpuSheet) -> None:
    if gpu.memory_gb_per_s is None:
        with pytest.raises(BadInputError, match="bandwidth"):
            ms(BIG, gpu, "fp32")
        return
    for dtype in gpu.dense_tflops:
        if dtype in ("fp4", "fp64", "int4"):
            continue
        answer = predict_operators(BIG, gpu, dtype=dtype)
        assert answer.step_ms.p50 > 0.95 * simplest_bound_ms(BIG, gpu, dtype=dtype)
        assert answer.step_ms.lo90 < answer.step_ms.p50 < answer.step_ms.hi90
        assert answer.power_w is None or 0 < answer.power_w <= (gpu.power_w or 0)


def test_one_tile_more_than_fills_the_card_costs_a_wave() -> None:
    """108 multiprocessors: 108 large tiles are one wave, 109 are more."""
    shape = parameters().products["tensor"]
    machine = Machine(flops=1e14, bytes_per_s=1e15, l2_bytes=1e9, multiprocessors=108, kernel_s=0.0)

    def seconds(batch: int) -> float:
        one = product_s(machine, shape, batch=batch, sizes=(256, 128, 8192), moved=1.0)
        return float(one)

    assert seconds(107) == pytest.approx(seconds(108))
    assert seconds(109) > 1.2 * seconds(108)
    assert seconds(216) == pytest.approx(2 * seconds(108), rel=0.01)


def test_small_products_reach_little_of_the_rate() -> None:
    def share(size: int) -> float:
        of = work(product(size, size, size))
        return simplest_bound_ms(of, A100, dtype="fp16") / ms(of, A100)

    shares = [share(size) for size in (64, 256, 1024, 4096)]
    assert shares == sorted(shares)
    assert shares[0] < 0.01 < 0.5 < shares[-1] < 1.0


def test_data_that_fits_the_last_cache_moves_faster() -> None:
    shape = parameters().products["vector"]
    machine = Machine(flops=1e13, bytes_per_s=1e12, l2_bytes=4e7, multiprocessors=100, kernel_s=0)
    near, far = reach(machine, shape, 1e6), reach(machine, shape, 1e9)
    assert near > 1.3 * far
    assert far == pytest.approx(1e12, rel=0.05)


def test_operations_are_kept_when_operators_become_kernels() -> None:
    conv = Operator(
        name="convolution", flops=2 * 8 * 64 * 56 * 56 * 32 * 9, bytes_read=10**6,
        bytes_written=10**6, input_shapes=((8, 32, 56, 56), (64, 32, 3, 3)),
        output_shapes=((8, 64, 56, 56),), matmul=True,
    )  # fmt: skip
    back = replace(
        conv, name="convolution_backward", phase="backward", flops=2 * conv.flops,
        input_shapes=((8, 64, 56, 56), (8, 32, 56, 56), (64, 32, 3, 3)),
        output_shapes=((8, 32, 56, 56), (64, 32, 3, 3)),
    )  # fmt: skip
    batched = Operator(
        name="bmm", flops=2 * 12 * 64 * 48 * 32, bytes_read=9000, bytes_written=9000, matmul=True,
        input_shapes=((12, 64, 32), (12, 32, 48)), output_shapes=((12, 64, 48),),
    )  # fmt: skip
    for op in (conv, back, batched, product(100, 200, 300)):
        k = kernels_of(work(op), How(dtype="fp16"))
        counted = float((2 * k["batch"] * k["m"] * k["n"] * k["k"] * k["repeat"]).sum())
        assert counted == pytest.approx(op.flops, rel=1e-6), op.name


def test_narrow_types_move_fewer_bytes_and_updates_stay_wide() -> None:
    update = Operator(
        name="adam_step", phase="optimizer", flops=13, bytes_read=4000, bytes_written=3000
    )
    narrow = kernels_of(work(sweep(1000), update), How(dtype="bf16"))
    assert list(narrow["moved"]) == [4000.0, 7000.0]


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_eight_bits_are_for_weights_and_products(dtype: str) -> None:
    product = Operator(
        name="mm", matmul=True, flops=2 * 10 * 20 * 30, bytes_read=4 * (10 * 30 + 30 * 20),
        bytes_written=4 * 10 * 20, parameter_bytes=4 * 30 * 20,
        input_shapes=((10, 30), (30, 20)), output_shapes=((10, 20),),
    )  # fmt: skip
    moved = kernels_of(work(sweep(1000), product), How(dtype=dtype))["moved"]
    assert list(moved) == [4000.0, 2 * (300 + 200) + 600]


def test_compiling_takes_bytes_and_starts_away() -> None:
    for of in (BIG, SMALL):
        assert ms(of, A100, plan_kind="compiled") < ms(of, A100)


def test_host_hides_behind_long_kernels_and_shows_beside_short_ones() -> None:
    assert predict_operators(BIG, A100, dtype="fp16").idle_share < 0.01
    assert predict_operators(SMALL, H100, dtype="bf16").bound_by == "overhead"
    assert waiting_s(1.0, 0.1) < 1e-3
    assert waiting_s(0.1, 1.0) == pytest.approx(0.9, rel=0.01)


def test_images_that_lie_channels_first_cost_the_tensor_units_a_copy() -> None:
    conv = Operator(
        name="convolution", flops=2 * 64 * 64 * 56 * 56 * 64, bytes_read=10**8,
        bytes_written=10**8, input_shapes=((64, 64, 56, 56), (64, 64, 1, 1)),
        output_shapes=((64, 64, 56, 56),), matmul=True,
    )  # fmt: skip
    assert ms(work(conv), A100, channels_last=False) > 1.2 * ms(work(conv), A100)
    assert ms(work(conv), A100, "fp32", channels_last=False) == ms(work(conv), A100, "fp32")


# Intervals.


def test_interval_widens_away_from_what_was_fitted() -> None:
    near = predict_operators(BIG, A100, dtype="fp16")
    far = predict_operators(BIG, H100, dtype="fp16")
    blank = predict_operators(BIG, replace(H100, l2_mb=None, power_w=None), dtype="fp16")
    farther = predict_operators(BIG, replace(H100, compute_capability="13.0"), dtype="fp16")
    assert near.widened == ()
    assert near.spread < far.spread < blank.spread
    assert far.spread < farther.spread
    assert "compute capability 9.0" in far.widened[0]
    assert any("last cache" in reason for reason in blank.widened)
    assert any("power limit" in reason for reason in blank.widened)
    assert blank.power_w is None and blank.energy_j is None


# Transfers from a measurement.


def test_a_measurement_on_the_same_card_comes_back() -> None:
    answer = transfer(BIG, 12.5, A100, A100, dtype="fp16")
    assert answer.step_ms.p50 == pytest.approx(12.5)


def test_a_measurement_carries_its_own_slowness_along() -> None:
    slow = transfer(BIG, 50.0, A100, H100, dtype="bf16", source_dtype="fp16")
    quick = transfer(BIG, 25.0, A100, H100, dtype="bf16", source_dtype="fp16")
    assert slow.step_ms.p50 == pytest.approx(2 * quick.step_ms.p50)
    with pytest.raises(BadInputError, match="more than 0"):
        transfer(BIG, 0.0, A100, H100, dtype="bf16")


# Power limits and known figures.


def test_power_limits_hold_the_clock_where_they_are_low_for_the_chip() -> None:
    """NeuSight's large fp32 products: V100 98 % of the printed rate, T4 50 %, both of 12 nm."""
    clock = parameters().clock
    v100 = clock_share(V100, clock, flops=peak_flops(V100, "fp32"), unit="vector")
    t4 = clock_share(T4, clock, flops=peak_flops(T4, "fp32"), unit="vector")
    assert v100 > 0.95
    assert 0.4 < t4 < 0.65


def test_below_the_lowest_voltage_the_clock_falls_in_proportion_to_the_power() -> None:
    clock = parameters().clock
    flops = peak_flops(T4, "fp32")
    deep = replace(T4, base_clock_mhz=None)
    half = replace(deep, power_w=None)
    shares = [clock_share(deep, clock, flops=flops * x, unit="vector") for x in (1.0, 2.0)]
    assert shares[0] < clock.lowest_voltage and shares[1] == pytest.approx(shares[0] / 2)
    assert clock_share(half, clock, flops=flops, unit="vector") == 1.0
    mild = [clock_share(deep, clock, flops=flops * x, unit="vector") for x in (0.5, 0.55)]
    assert mild[0] / mild[1] == pytest.approx(1.1**clock.exponent)


def test_no_clock_falls_below_what_the_maker_guarantees() -> None:
    l4 = CARDS["L4"]
    assert l4.base_clock_mhz and l4.boost_clock_mhz
    share = clock_share(l4, parameters().clock, flops=peak_flops(l4, "fp32"), unit="vector")
    assert share == pytest.approx(l4.base_clock_mhz / l4.boost_clock_mhz)


def test_power_and_energy_belong_together() -> None:
    answer = predict_operators(BIG, A100, dtype="fp16")
    assert answer.power_w is not None and answer.energy_j is not None
    assert answer.energy_j == pytest.approx(answer.power_w * answer.step_ms.p50 / 1e3)
    clock = parameters().clock
    rest = mean_power_w(A100, clock, flops_per_s=0, bytes_per_s=0, unit="tensor", busy=0)
    assert rest is not None and rest < answer.power_w
    assert slowdown(A100, clock, wanted_w=200, limit_w=400) == 1.0
    assert slowdown(A100, clock, wanted_w=390, limit_w=200) > 1.05
    assert slowdown(A100, clock, wanted_w=390, limit_w=150) > slowdown(
        A100, clock, wanted_w=390, limit_w=250
    )


def test_dense_rates_only() -> None:
    """1,979 (H100) and 242 (L4) TFLOP/s in fp16 are sparse; an RTX 4090 does 165, not 82.6."""
    assert peak_flops(H100, "bf16") == pytest.approx(989.5e12, rel=0.01)
    assert peak_flops(H100, "tf32") == pytest.approx(494.7e12, rel=0.01)
    assert peak_flops(CARDS["L4"], "fp16") == pytest.approx(121e12, rel=0.01)
    assert CARDS["L4"].memory_gb_per_s == 300
    assert peak_flops(CARDS["GeForce RTX 4090"], "fp16") == pytest.approx(165.2e12, rel=0.01)


def test_a_card_without_such_units_says_so() -> None:
    with pytest.raises(BadInputError, match="no bf16 rate"):
        predict_operators(BIG, V100, dtype="bf16")
    with pytest.raises(BadInputError, match="no fp8 rate"):
        predict_operators(BIG, A100, dtype="fp8")
    assert ms(BIG, V100, "tf32") == pytest.approx(ms(BIG, V100, "fp32"))


def test_what_a_sheet_lacks_is_named() -> None:
    assert rates(A100, parameters(), "fp16").missing == ()
    bare = replace(A100, multiprocessors=None, l2_mb=None)
    assert rates(bare, parameters(), "fp16").missing == ("last cache", "multiprocessors")


def test_the_simplest_bound_is_work_over_units() -> None:
    one = simplest_bound_ms(BIG, A100, dtype="fp16")
    assert one == pytest.approx(1e3 * 4 * 2 * 4096**3 / 312e12)
    assert simplest_bound_ms(BIG, A100, dtype="fp16", devices=8) == pytest.approx(one / 8)
    with pytest.raises(BadInputError):
        simplest_bound_ms(BIG, A100, dtype="fp16", devices=0)


def test_totals_alone_give_a_step() -> None:
    resnet = Counts(macs=4.1e9, activations=11.1e6, parameters=25.6e6, batch=256)
    p = parameters()
    slow, quick = (
        float(step_of_counts_s(resnet, CARDS[f"GeForce RTX {name}"], p, dtype="fp16"))
        for name in ("3090", "4090")
    )
    assert 0.02 < quick < slow < 0.5


def test_parts_add_up() -> None:
    answer = predict_operators(BIG, A100, dtype="fp16")
    total = answer.compute_ms + answer.memory_ms + answer.overhead_ms
    assert total == pytest.approx(answer.step_ms.p50, rel=1e-6)
    assert sum(op.ms for op in answer.operators) <= answer.step_ms.p50 * 1.0001
    k = kernels_of(BIG, How(dtype="fp16"))
    assert all((term >= 0).all() for term in kernel_terms(k, A100, parameters(), "fp16"))


def test_predicting_needs_no_torch() -> None:
    code = (
        "import sys, suanli.cost.predictor, suanli.cost.scaling, suanli.cost.cpu_time\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_halves_on_vector_units_add_up_at_the_rate_of_fp32() -> None:
    """A P100's printed fp16 rate adds up in halves, which libraries under PyTorch do not."""
    card, p = CARDS["Tesla P100 PCIe 16GB"], parameters()
    narrow, wide = (rates(card, p, dtype).machine.flops for dtype in ("fp16", "fp32"))
    assert narrow == wide and peak_flops(card, "fp16") == pytest.approx(18.7e12)
    assert predict_operators(BIG, card, dtype="fp16").sol_ms < 1e3 * BIG.matmul_flops / 18e12
