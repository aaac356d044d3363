"""Expected gains: ratios of the cost model on measured times, and which precisions are faster."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from suanli.base.errors import BadInputError
from suanli.base.plan import Plan
from suanli.base.profile_results import Advice, StepTimes
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Operator
from suanli.cost.changes import batch_ratios, cpu_ratios, gpu_ratios, scaled
from suanli.cost.cpu_manner import Manner, compiled_training_s
from suanli.devices import find_sheet
from suanli.profiling.advice import Case, _precision, _quantization, advise
from suanli.profiling.expected import Basis, manner_of
from suanli.profiling.rows import Row
from suanli.profiling.verb import faster
from tests.profile_parts import ceilings, pointwise, product

MACHINE = ceilings(bf16=8.0, fp32=1e12)
EAGER = Plan(backend="eager")


def convolution(*, size: int = 2**22, flops: int = 10**9) -> Operator:
    return product(
        name="convolution",
        flops=flops,
        bytes_read=size,
        bytes_written=size,
        parameter_bytes=2**12,
        input_shapes=((8, 64, 32, 32), (64, 64, 3, 3)),
        output_shapes=((8, 64, 32, 32),),
    )


def test_nothing_changes_where_nothing_is_changed() -> None:
    operators = [product(), pointwise(), convolution()]
    assert cpu_ratios(operators, Manner(), Manner(), MACHINE) == [1.0, 1.0, 1.0]


def test_large_products_gain_most_of_what_the_units_give() -> None:
    large = product(flops=10**12)
    (ratio,) = cpu_ratios([large], Manner(), Manner(precision="bf16"), MACHINE)
    assert 1 / 8 < ratio < 1 / 3


def test_small_products_gain_nothing() -> None:
    small = product(flops=10**6, bytes_read=10**4, bytes_written=10**3, parameter_bytes=10**4)
    (ratio,) = cpu_ratios([small], Manner(), Manner(precision="bf16"), MACHINE)
    assert ratio > 1, "the call costs more than the units save"


def test_pointwise_operators_gain_by_width_and_by_fusion() -> None:
    relu = pointwise(size=10**8)
    narrow, fused, both = (
        cpu_ratios([relu], Manner(), manner, MACHINE)[0]
        for manner in (
            Manner(precision="bf16"),
            Manner(fused="compiled"),
            Manner(precision="bf16", fused="engine"),
        )
    )
    assert narrow == pytest.approx(0.5, rel=0.35)  # half as many pages are new, too
    assert both < fused < 1
    assert both < narrow


def test_images_channels_first_cost_copies_and_more_so_in_bf16() -> None:
    conv = convolution()
    first, last = Manner(), Manner(channels_last=True)
    (wide,) = cpu_ratios([conv], first, last, MACHINE)
    low = {"precision": "bf16"}
    (narrow,) = cpu_ratios([conv], Manner(**low), Manner(channels_last=True, **low), MACHINE)
    assert narrow < wide < 1
    assert cpu_ratios([product()], first, last, MACHINE) == [1.0], "no images, no copies"


def pool(phase: str = "forward") -> Operator:
    """A max-pool by two, or its gradient: [32, 64, 32, 32] and [32, 64, 16, 16]."""
    whole, pooled = (32, 64, 32, 32), (32, 64, 16, 16)
    forward = phase == "forward"
    return Operator(
        name="max_pool2d_with_indices" + "_backward" * (not forward),
        phase=phase,  # type: ignore[arg-type]
        flops=2**21,
        bytes_read=2**23,
        bytes_written=2**23,
        input_shapes=(whole,) if forward else (pooled, whole),
        output_shapes=(pooled,) if forward else (whole,),
    )


def test_a_max_pool_channels_first_goes_element_by_element() -> None:
    (ratio,) = cpu_ratios([pool()], Manner(), Manner(channels_last=True), MACHINE)
    assert ratio < 0.5
    single = replace(pool(), input_shapes=((1, 32, 26, 26),))
    assert cpu_ratios([single], Manner(), Manner(channels_last=True), MACHINE) == [1.0]
    (threefold,) = batch_ratios([pool()], Manner(), MACHINE, 3.0)
    assert threefold == pytest.approx(3.0, rel=0.05), "elements cost, not calls"


def test_compiled_training_pays_for_masks_and_scattered_gradients() -> None:
    relu = pointwise(output_shapes=((32, 64, 32, 32),))
    back = pointwise("threshold_backward", output_shapes=((32, 64, 32, 32),), phase="backward")
    both = compiled_training_s([relu, pool(), pool("backward"), back], MACHINE)
    pooled = compiled_training_s([pool(), pool("backward")], MACHINE)
    assert both > pooled > 0
    assert compiled_training_s([relu, convolution(), back], MACHINE) == 0, "its output is kept"
    single = replace(MACHINE, threads=1)
    assert compiled_training_s([pool(), pool("backward")], single) == pytest.approx(2 * pooled)


def _training_step(plan: TrainPlan) -> float | None:
    """A step whose max-pool has its gradient, of one millisecond as it is now."""
    forward, backward = pool(), pool("backward")
    rows = [
        Row(name="pool", phase="forward", count=1, ms=10.0, operators=[forward], indices=[0]),
        Row(name="pool", phase="backward", count=1, ms=1.0, operators=[backward], indices=[1]),
    ]
    times = StepTimes(forward_ms=10.0, backward_ms=1.0, idle_ms=5.0)
    return _basis(rows=rows, times=times, plan=TrainPlan()).step_with(plan)


def test_compiling_a_step_with_a_max_pool_may_lose() -> None:
    now = _training_step(TrainPlan())
    compiled = _training_step(TrainPlan(compile="default"))
    assert now == pytest.approx(16.0)
    assert compiled is not None
    scattered = 2**19 * 5e-6 / 2
    assert compiled > 5.0 + scattered, "gaps of training stay, gradients go one by one"


def test_an_engines_convolutions_reach_more_than_a_librarys_calls() -> None:
    conv = convolution(flops=10**11)
    eager = Manner(precision="bf16", channels_last=True)
    engine = Manner(precision="bf16", channels_last=True, fused="engine")
    (ratio,) = cpu_ratios([conv], eager, engine, MACHINE)
    assert 0.5 < ratio < 0.8


def test_autocast_pays_for_its_casts_by_the_call() -> None:
    small = product(flops=10**5, bytes_read=10**4, bytes_written=10**3, parameter_bytes=10**3)
    cast, narrow = Manner(precision="bf16", autocast=True), Manner(precision="bf16")
    (ratio,) = cpu_ratios([small], narrow, cast, MACHINE)
    assert ratio > 1.3
    assert cpu_ratios([product(flops=10**12)], narrow, cast, MACHINE)[0] < 1.02


def test_torchs_recurrent_layers_gain_nothing_by_sixteen_bits() -> None:
    layer = product(name="rnn_tanh", flops=10**10)
    narrow = Manner(precision="bf16")
    assert cpu_ratios([layer], Manner(), narrow, MACHINE)[0] > 1
    assert cpu_ratios([layer], Manner(), replace(narrow, fused="engine"), MACHINE)[0] < 0.5


def test_weights_that_are_taken_as_a_batch_are_turned_in_sixteen_bits() -> None:
    head = product(
        name="bmm", flops=77 * 10**6, bytes_read=154 * 10**6, parameter_bytes=154 * 10**6
    )
    low = Manner(precision="bf16")
    assert cpu_ratios([head], Manner(), low, MACHINE)[0] > 3
    assert cpu_ratios([replace(head, name="addmm")], Manner(), low, MACHINE)[0] < 1.5
    assert cpu_ratios([head], Manner(), replace(low, fused="engine"), MACHINE)[0] < 1


def test_a_single_small_image_is_unfolded_and_needs_no_other_layout() -> None:
    fields = {"name": "convolution", "flops": 10**6, "bytes_read": 10**5, "bytes_written": 10**5}
    small = product(input_shapes=((1, 32, 14, 14), (64, 32, 3, 3)), **fields)
    large = product(input_shapes=((1, 32, 28, 28), (64, 32, 3, 3)), **fields)
    last = Manner(channels_last=True)
    assert cpu_ratios([small], Manner(), last, MACHINE) == [1.0]
    assert cpu_ratios([large], Manner(), last, MACHINE)[0] < 1.0
    narrow = Manner(precision="bf16", channels_last=True)
    assert cpu_ratios([small], Manner(), narrow, MACHINE)[0] > 1.5, "the library's call weighs more"


def test_a_larger_batch_shares_the_weights() -> None:
    bound_by_weights = product(
        flops=10**6, bytes_read=10**8, parameter_bytes=10**8 - 10**3, bytes_written=10**3
    )
    (ratio,) = batch_ratios([bound_by_weights], Manner(), MACHINE, 8.0)
    assert ratio < 1.1
    (busy,) = batch_ratios([product(flops=10**12)], Manner(), MACHINE, 8.0)
    assert busy == pytest.approx(8.0, rel=0.05)


def test_memory_beyond_glibcs_threshold_is_faulted_in_anew() -> None:
    almost = pointwise(size=30 * 2**20)
    (ratio,) = batch_ratios([almost], Manner(), MACHINE, 2.0)
    assert ratio > 3, "twice the samples, and pages on top"
    (kept,) = batch_ratios([almost], Manner(keeps_memory=True), MACHINE, 2.0)
    assert kept == pytest.approx(2.0, rel=0.1)


def test_scaling_keeps_the_parameters() -> None:
    op = product(flops=100, bytes_read=50, parameter_bytes=10, bytes_written=20)
    grown = scaled(op, 3.0)
    assert (grown.flops, grown.bytes_read, grown.bytes_written) == (300, 130, 60)
    assert grown.parameter_bytes == 10


def test_a_card_is_asked_through_its_own_model() -> None:
    sheet = find_sheet("a100-sxm4-80gb")
    op = product(flops=2 * 4096**3, input_shapes=((4096, 4096), (4096, 4096)))
    (ratio,) = gpu_ratios([op], Manner(), Manner(precision="bf16"), sheet)
    assert ratio < 0.2, "tensor cores against fp32 without them"


def _basis(**fields) -> Basis:
    rows = [
        Row(name="addmm", phase="forward", count=1, ms=80.0, operators=[product(flops=10**10)]),
        Row(name="copy", phase="forward", count=1, ms=5.0),
        Row(name="relu", phase="forward", count=9, ms=5.0, operators=[pointwise(size=10**8)]),
    ]
    times = StepTimes(forward_ms=90.0, idle_ms=10.0)
    settings = {"rows": rows, "times": times, "ceilings": MACHINE, "plan": EAGER, "batch": 4}
    return Basis(**settings | fields)


def test_the_step_is_the_sum_of_what_changes_and_what_stays() -> None:
    basis = _basis()
    assert basis.step_with(EAGER) == pytest.approx(100.0)
    low = basis.step_with(EAGER.with_(precision="bf16"))
    assert 15.0 < low < 60.0, "copies and gaps stay"
    fused = basis.step_with(EAGER.with_(backend="inductor"))
    assert 85.0 < fused < 99.0, "gaps shrink with the calls"
    assert basis.step_with(EAGER.with_(precision="fp4")) is None


def test_an_engine_is_one_call() -> None:
    basis = _basis(times=StepTimes(forward_ms=90.0, idle_ms=60.0))
    engine = Plan(backend="openvino", precision="fp32")
    compiled = EAGER.with_(backend="inductor")
    assert basis.step_with(compiled) - basis.step_with(engine) > 10.0, "products' gaps go, too"


def test_nothing_is_expected_to_beat_its_own_limit() -> None:
    at_the_limit = Row(
        name="addmm", phase="forward", count=1, ms=125.0, operators=[product(flops=10**12)]
    )
    basis = _basis(rows=[at_the_limit], times=StepTimes(forward_ms=125.0))
    assert basis.step_with(EAGER.with_(precision="bf16")) >= 125.0 - 1e-6


def test_manners_of_plans() -> None:
    assert manner_of(TrainPlan(precision="bf16")).autocast
    assert not manner_of(TrainPlan(precision="bf16", weights="bf16")).autocast
    compiled = manner_of(TrainPlan(compile="default"))
    assert (compiled.fused, compiled.training) == ("compiled", True)
    assert compiled.channels_last, "whatever the plan says"
    on_card = Plan(backend="inductor", device="cuda:0")
    assert not manner_of(on_card).channels_last
    assert manner_of(EAGER.with_(backend="inductor")).channels_last
    engine = manner_of(Plan(backend="openvino", precision="bf16"))
    assert (engine.fused, engine.channels_last) == ("engine", True)


def test_faster_precisions_are_those_with_higher_ceilings() -> None:
    assert faster(MACHINE, "fp32") == ("bf16",)
    assert faster(MACHINE, "bf16") == ()
    assert faster(ceilings(), "fp32") == ()


def test_a_batch_that_no_ceiling_speaks_of_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BadInputError("int64 has no products here")

    monkeypatch.setattr("suanli.profiling.expected.operator_sol", refuse)
    assert _basis(sheet=find_sheet("a100-sxm4-80gb")).step_at(32) is None


def test_training_on_a_processor_is_not_sent_to_fp16() -> None:
    basis = _basis(plan=TrainPlan())
    subject = SimpleNamespace(
        plan=TrainPlan(), model=object(), training=True, device="cpu", stepper=None
    )
    case = Case(
        subject=subject,  # type: ignore[arg-type]
        measured=None,  # type: ignore[arg-type]
        basis=basis,
        faster=("fp16", "bf16"),
        compiler=False,
    )
    assert [item.plan.precision for item in _precision(case)] == ["bf16"]
    subject.training = False
    assert [item.plan.precision for item in _precision(case)] != ["bf16"]


def _int8_only(plan: Plan, device: str) -> Case:
    """A device whose integer units alone are faster than fp32."""
    subject = SimpleNamespace(
        plan=plan, model=object(), training=False, device=device, stepper=None, kind="workload"
    )
    return Case(
        subject=subject,  # type: ignore[arg-type]
        measured=None,  # type: ignore[arg-type]
        basis=_basis(plan=plan),
        faster=("int8",),
        compiler=False,
    )


def test_gains_within_the_models_error_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _int8_only(EAGER, "cpu")
    told = {"precision": 1.09, "compile": 1.12, "data": 1.03, "synchronisation": 1.01}
    given = [
        Advice(change=kind, kind=kind, reason="", how="", expected_speedup=gain)  # type: ignore[arg-type]
        for kind, gain in told.items()
    ]
    monkeypatch.setattr("suanli.profiling.advice.RULES", (lambda _: iter(given),))
    assert [item.kind for item in advise(case)] == ["compile", "data"]


def test_integers_are_no_precision_to_cast_to() -> None:
    assert list(_precision(_int8_only(EAGER, "cpu"))) == []


def test_an_engine_for_processors_is_not_advised_on_a_card() -> None:
    card = EAGER.with_(device="cuda:0")
    assert list(_quantization(_int8_only(card, "cuda:0"))) == []


def test_an_engine_that_is_not_installed_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suanli.profiling.advice.backends", dict)
    assert list(_quantization(_int8_only(EAGER, "cpu"))) == []
