"""The speed of light and the estimate, on ceilings and work made by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest

from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.work import Operator, Work
from suanli.cost import estimate_ms, operator_sol, speed_of_light
from suanli.cost.rates import achieved, element_bytes, peak

MB = 10**6


def matmul(dtype: str, hardware: float | None, reached: float | None = None, **fields) -> Ceiling:
    return Ceiling(
        what="matmul", unit="FLOP/s", dtype=dtype, hardware=hardware, achieved=reached, **fields
    )


def reading(size: int, rate: float) -> Ceiling:
    return Ceiling(what="read", unit="B/s", achieved=rate, working_set_bytes=size)


def ceilings(*extra: Ceiling, overhead_s: float = 2e-6) -> Ceilings:
    call = Ceiling(what="call_overhead", unit="s", achieved=overhead_s)
    items = (
        matmul("fp32", 1e12, 0.5e12),
        matmul("bf16", 4e12, 2e12, mark="derived"),
        matmul("int8", 8e12, 1e12),
        reading(1 * MB, 400e9),
        reading(16 * MB, 50e9),
        reading(200 * MB, 25e9),
        call,
    )
    device = DeviceInfo(name="cpu", title="test", fingerprint="test", memory_bytes=2**34)
    return Ceilings(device=device, items=(*items, *extra), threads=2, measured_at="2026-01-01")


def without(*names: str) -> Ceilings:
    """Ceilings of which some kinds or types were not measured."""
    whole = ceilings()
    return replace(
        whole, items=tuple(c for c in whole.items if c.what not in names and c.dtype not in names)
    )


def product(flops: int, **fields) -> Operator:
    return Operator(name="mm", flops=flops, matmul=True, **fields)


def work(*operators: Operator, parameters: int = 0, **fields) -> Work:
    settings = {"input_bytes": 0, "output_bytes": 0, "parameter_bytes": 4 * parameters} | fields
    return Work(operators=operators, batch=1, parameters=parameters, **settings)


# Speed of light: compute


@pytest.mark.parametrize(("precision", "ms"), [("fp32", 8.0), ("bf16", 2.0), ("int8", 1.0)])
def test_compute_uses_the_hardwares_rate_of_the_precision(precision, ms):
    sol = speed_of_light(work(product(8 * 10**9)), ceilings(), precision=precision)
    assert sol.compute_ms == sol.ms == pytest.approx(ms)
    assert sol.bound_by == "compute"


def test_a_library_faster_than_the_hardware_figure_moves_the_bound():
    quick = ceilings(matmul("fp32", 1e12, 1.6e12))
    sol = speed_of_light(work(product(8 * 10**9)), quick, precision="fp32")
    assert sol.ms == pytest.approx(5.0)


def test_a_low_precision_that_is_slow_does_not_bind_what_may_run_wider():
    slow = replace(
        ceilings(), items=(matmul("fp32", 4e12), matmul("bf16", 1e12), matmul("fp16", 9e12))
    )
    sol = speed_of_light(work(product(8 * 10**9)), slow, precision="bf16")
    assert sol.ms == pytest.approx(2.0)  # fp32's rate; fp16 rounds differently and is no help


def test_an_unmeasured_precision_has_no_compute_term():
    # The bf16 rate is no bound on int8: units for int8 may be faster.
    sol = speed_of_light(work(product(8 * 10**9)), without("int8"), precision="int8")
    assert sol.compute_ms == 0
    assert sol.bound_by == "overhead"


def test_only_products_and_only_what_is_needed_of_them():
    padded = product(8 * 10**9, needed_flops=4 * 10**9)
    pointwise = Operator(name="relu", flops=10**12, bytes_read=10**12, bytes_written=10**12)
    sol = speed_of_light(work(padded, pointwise), ceilings(), precision="fp32")
    assert sol.ms == pytest.approx(4.0)


def test_unknown_precisions_are_named():
    for precision in ("int4", "float32"):
        with pytest.raises(BadInputError, match=precision):
            speed_of_light(work(), ceilings(), precision=precision)
    with pytest.raises(BadInputError, match="float32"):
        speed_of_light(work(), ceilings(), precision="fp32", weight_precision="float32")


# Speed of light: memory


def test_weights_inputs_and_outputs_once_at_the_plans_width():
    model = work(parameters=100 * MB, input_bytes=30 * MB, output_bytes=20 * MB)
    for precision, weights in (("fp32", 400), ("bf16", 200), ("int8", 100)):
        sol = speed_of_light(model, ceilings(), precision=precision)
        # 450 MB and 250 MB lie beyond the largest set (25 GB/s); 150 MB between two: 50 GB/s.
        rate = 50e9 if precision == "int8" else 25e9
        moved = weights + 30 + (0 if precision == "int8" else 20)
        assert sol.memory_ms == pytest.approx(1e3 * moved * MB / rate), precision
        assert sol.bound_by == "memory"


def test_caches_have_their_own_rates():
    small = speed_of_light(work(parameters=MB // 4), ceilings(), precision="fp32")
    large = speed_of_light(work(parameters=100 * MB), ceilings(), precision="fp32")
    assert small.memory_ms == pytest.approx(1e3 * MB / 400e9)
    assert large.memory_ms == pytest.approx(1e3 * 400 * MB / 25e9)


def test_only_parameters_that_are_read():
    table = work(parameters=100 * MB, read_parameters=50 * MB, read_parameter_bytes=200 * MB)
    sol = speed_of_light(table, ceilings(), precision="fp32")
    assert sol.memory_ms == pytest.approx(1e3 * 200 * MB / 25e9)


def test_weights_narrower_in_the_model_than_in_the_plan_stay_narrow():
    stored_in_int8 = work(parameters=300 * MB, parameter_bytes=300 * MB)
    sol = speed_of_light(stored_in_int8, ceilings(), precision="bf16")
    assert sol.memory_ms == pytest.approx(1e3 * 300 * MB / 25e9)


def test_weight_precision_is_apart_from_the_precision_of_products():
    model = work(product(4 * 10**9), parameters=400 * MB)
    sol = speed_of_light(model, ceilings(), precision="bf16", weight_precision="int4")
    assert sol.memory_ms == pytest.approx(1e3 * 200 * MB / 25e9)
    assert sol.compute_ms == pytest.approx(1.0)


def training_work(states: int) -> Work:
    size = 400 * MB
    step = Operator(
        name="step",
        phase="optimizer",
        flops=10**12,
        bytes_read=(2 + states) * size,
        bytes_written=(1 + states) * size,
        parameter_bytes=size,
    )
    return work(product(10**9), step, parameters=100 * MB)


def test_training_moves_weights_and_states_but_needs_no_stored_gradient():
    for states in (0, 2):
        sol = speed_of_light(training_work(states), ceilings(), precision="bf16")
        passes = 1 + states + 1 + states  # read and written
        assert sol.memory_ms == pytest.approx(1e3 * passes * 400 * MB / 25e9)


def test_training_keeps_master_weights_unless_told():
    stored = speed_of_light(training_work(0), ceilings(), precision="bf16")
    narrow = speed_of_light(training_work(0), ceilings(), precision="bf16", weight_precision="bf16")
    assert stored.memory_ms - narrow.memory_ms == pytest.approx(1e3 * 200 * MB / 25e9)


# Speed of light: together


def test_terms_overlap_and_the_largest_binds():
    model = work(product(8 * 10**9), parameters=100 * MB)
    sol = speed_of_light(model, ceilings(overhead_s=0.1), precision="fp32", measured_ms=400.0)
    assert (sol.compute_ms, sol.memory_ms) == (pytest.approx(8.0), pytest.approx(16.0))
    assert sol.overhead_ms == sol.ms == pytest.approx(100.0)
    assert sol.bound_by == "overhead"
    assert sol.fraction == pytest.approx(0.25)


def test_marks_of_the_ceilings_used():
    model = work(product(8 * 10**9), parameters=MB)
    assert speed_of_light(model, ceilings(), precision="fp32").marks == ("measured",)
    assert speed_of_light(model, ceilings(), precision="bf16").marks == ("derived", "measured")


def test_without_ceilings_there_is_no_bound_and_no_error():
    none = without("matmul", "read", "call_overhead")
    sol = speed_of_light(work(product(10**9), parameters=MB), none, precision="fp32")
    assert (sol.ms, sol.marks, sol.fraction) == (0.0, (), None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_more_work_never_takes_less(precision):
    one = speed_of_light(work(product(10**9), parameters=MB), ceilings(), precision=precision)
    two = speed_of_light(
        work(product(10**9), product(10**9), parameters=2 * MB), ceilings(), precision=precision
    )
    assert two.ms >= one.ms


def test_lower_precision_never_takes_longer():
    model = work(product(10**9), parameters=3 * MB, input_bytes=MB)
    times = [speed_of_light(model, ceilings(), precision=p).ms for p in ("fp32", "bf16", "int8")]
    assert times == sorted(times, reverse=True)


# Winograd


def convolution(
    size: int, out: int, kernel: tuple[int, int], name: str = "convolution"
) -> Operator:
    x, weight, y = (1, 8, size, size), (8, 8, *kernel), (1, 8, out, out)
    shapes = (y, x, weight) if name.endswith("backward") else (x, weight)
    return Operator(
        name=name, flops=8 * 10**9, matmul=True, input_shapes=shapes, output_shapes=(y,)
    )


@pytest.mark.parametrize(
    ("op", "saving"),
    [
        (convolution(56, 56, (3, 3)), 4),  # padded, stride one
        (convolution(56, 54, (3, 3)), 4),  # not padded
        (convolution(56, 28, (3, 3)), 1),  # stride two
        (convolution(57, 28, (3, 3)), 1),
        (convolution(56, 56, (1, 1)), 1),
        (convolution(56, 56, (3, 5)), 1),
        (convolution(4, 2, (3, 3)), 4),  # too short to tell: the bound stays a bound
        (convolution(56, 56, (3, 3), "convolution_backward"), 4),
        (convolution(56, 28, (3, 3), "convolution_backward"), 1),
        (product(8 * 10**9, input_shapes=((3, 3), (3, 3))), 1),
    ],
)
def test_winograd_where_it_fits(op, saving):
    plain = speed_of_light(work(op), ceilings(), precision="fp32")
    assert plain.ms == pytest.approx(8.0)
    fewer = speed_of_light(work(op), ceilings(), precision="fp32", winograd=True)
    assert fewer.ms == pytest.approx(8.0 / saving)


# One operator


def test_one_operator_by_compute_and_by_memory():
    heavy = product(8 * 10**9, bytes_read=MB)
    assert operator_sol(heavy, ceilings(), "bf16") == (pytest.approx(2.0), "compute")
    light = product(10**3, bytes_read=300 * MB, bytes_written=100 * MB)
    assert operator_sol(light, ceilings(), "fp32") == (pytest.approx(16.0), "memory")
    # Half the width: 200 MB, still beyond the caches.
    assert operator_sol(light, ceilings(), "bf16") == (pytest.approx(8.0), "memory")


def test_an_operator_that_is_no_product_is_bound_by_its_bytes():
    relu = Operator(name="relu", flops=10**15, bytes_read=200 * MB, bytes_written=200 * MB)
    assert operator_sol(relu, ceilings(), "fp32") == (pytest.approx(16.0), "memory")
    in_cache = replace(relu, bytes_read=MB // 2, bytes_written=MB // 4)
    # In a cache reads and writes have ports of their own.
    assert operator_sol(in_cache, ceilings(), "fp32")[0] == pytest.approx(1e3 * MB / 2 / 400e9)


def test_integers_do_not_shrink_and_views_cost_nothing():
    index = Operator(name="gather", dtype="int64", bytes_read=400 * MB)
    assert operator_sol(index, ceilings(), "int8")[0] == pytest.approx(16.0)
    view = Operator(name="view")
    assert operator_sol(view, ceilings(), "fp32") == (0.0, "memory")


# The estimate


def test_estimate_is_a_roofline_with_what_libraries_reach():
    model = work(product(10**9, bytes_read=MB), Operator(name="relu", bytes_read=MB))
    call_ms = 2e-3
    assert estimate_ms(model, ceilings(), "fp32") == pytest.approx(2.0 + call_ms)
    assert estimate_ms(model, ceilings(), "bf16") == pytest.approx(0.5 + call_ms)
    eager = estimate_ms(model, ceilings(), "fp32", fused=False)
    assert eager == pytest.approx(2.0 + 1e3 * MB / 400e9 + 2 * call_ms)


def test_estimate_is_not_below_the_bound_for_products():
    model = work(product(10**9, bytes_read=40 * MB, bytes_written=4 * MB), parameters=10 * MB)
    for precision in ("fp32", "bf16", "int8"):
        bound = speed_of_light(model, ceilings(), precision=precision).ms
        assert estimate_ms(model, ceilings(), precision) >= bound


def test_estimate_falls_back_to_fp32_and_never_to_zero():
    assert estimate_ms(work(), ceilings(), "bf16") == pytest.approx(2e-3)
    only_fp32 = without("bf16", "int8")
    assert estimate_ms(work(product(10**9)), only_fp32, "int8") > 1.9


# Rates


def test_rates():
    assert peak(ceilings(), "bf16").value == 4e12
    assert peak(ceilings(), "bf16").mark == "derived"
    assert peak(ceilings(), "fp16") is None
    assert achieved(ceilings(), "int8") == 2e12  # bf16 beats it in practice
    assert achieved(without("matmul"), "fp32") is None
    assert element_bytes("int4") == 0.5


def test_cost_needs_no_torch():
    program = "import sys, suanli.cost; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
