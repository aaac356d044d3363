"""Expected gains: ratios of the cost model on measured times, and which precisions are faster."""

from types import SimpleNamespace

import pytest

from suanli.base.errors import BadInputError
from suanli.base.plan import Plan
from suanli.base.profile_results import StepTimes
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Operator
from suanli.cost.changes import batch_ratios, cpu_ratios, gpu_ratios, scaled
from suanli.cost.cpu_manner import Manner
from suanli.devices import find_sheet
from suanli.profiling.advice import Case, _precision, _quantization
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


def test_nothing_is_expected_to_beat_its_own_limit() -> None:
    at_the_limit = Row(
        name="addmm", phase="forward", count=1, ms=125.0, operators=[product(flops=10**12)]
    )
    basis = _basis(rows=[at_the_limit], times=StepTimes(forward_ms=125.0))
    assert basis.step_with(EAGER.with_(precision="bf16")) >= 125.0 - 1e-6


def test_manners_of_plans() -> None:
    assert manner_of(TrainPlan(precision="bf16")).autocast
    assert not manner_of(TrainPlan(precision="bf16", weights="bf16")).autocast
    assert manner_of(TrainPlan(compile="default")).fused == "compiled"
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


def test_integers_are_no_precision_to_cast_to() -> None:
    assert list(_precision(_int8_only(EAGER, "cpu"))) == []


def test_an_engine_for_processors_is_not_advised_on_a_card() -> None:
    card = EAGER.with_(device="cuda:0")
    assert list(_quantization(_int8_only(card, "cuda:0"))) == []


def test_an_engine_that_is_not_installed_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suanli.profiling.advice.backends", dict)
    assert list(_quantization(_int8_only(EAGER, "cpu"))) == []
