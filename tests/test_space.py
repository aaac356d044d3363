"""Which plans are listed, in which order, and why the others are not."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli.base.plan import BackendSpec, Plan
from suanli.plans.outlook import only_change
from suanli.plans.situation import why_not_precision, why_not_scheme
from suanli.plans.space import Candidate, Situation, candidates, decisions, family

AMX = ("avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
ALPHA = BackendSpec(
    name="alpha",
    install="pip install alpha",
    packages=("alpha",),
    devices=("cpu", "cuda"),
    precisions={"cpu": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "tf32", "bf16", "fp16")},
    layouts=("contiguous", "channels_last"),
    options={"autocast": (False, True), "graphs": (False, True)},
    option_needs={"autocast": ("bf16", "fp16"), "graphs": ("cuda",)},
    promise={"fp32": 1.0, "bf16": 0.5, "cuda/bf16": 0.2},
    build_s=0.5,
    needs_export=False,
    baselines=(
        Plan(backend="alpha", options={"source": True}),
        Plan(backend="alpha", precision="bf16", options={"source": True}),
        Plan(backend="alpha", device="cuda", options={"source": True}),
    ),
)
BETA = BackendSpec(
    name="beta",
    install="pip install beta",
    packages=("beta",),
    precisions={"cpu": ("fp32", "bf16")},
    quantizations={"cpu": ("int8-static", "int8-weight")},
    promise={"fp32": 0.6, "bf16": 0.15, "int8-static": 0.1, "int8-weight": 0.3},
    options={"pin": (True, False), "level": (3, 1, 2)},
    build_s=8.0,
    streams=True,
)


def situation(**changes: object) -> Situation:
    settings: dict[str, object] = {
        "device": "cpu",
        "cores": 2,
        "features": AMX,
        "objective": "latency",
        "batch": 1,
        "max_batch": 32,
        "accepts_quantised": True,
        "calibration_samples": 64,
        "present": frozenset({"alpha", "beta"}),
    }
    return Situation(**(settings | changes))  # type: ignore[arg-type]


def tryable(found: tuple[Candidate, ...]) -> list[Candidate]:
    return [c for c in found if not c.why_not]


def why_not(found: tuple[Candidate, ...], name: str) -> str:
    reasons = [c.why_not for c in found if c.family == name and c.why_not]
    assert len(reasons) == 1, reasons
    return reasons[0]


def test_one_coarse_plan_per_family_and_the_reference_first() -> None:
    found = candidates([ALPHA, BETA], situation(), eager_ms=50.0)
    assert found[0].baseline
    assert found[0].plan == ALPHA.baselines[0]
    coarse = [c.family for c in found if c.coarse]
    assert coarse == [
        *("alpha fp32", "alpha bf16", "beta fp32", "beta bf16"),
        *("beta int8-static", "beta int8-weight"),
    ]
    assert len({c.plan.key for c in found}) == len(found)


def test_expectations_come_from_the_promise() -> None:
    found = candidates([ALPHA, BETA], situation(build_scale=0.5), eager_ms=50.0)
    coarse = {c.family: c for c in found if c.coarse}
    assert coarse["beta int8-static"].expected_ms == pytest.approx(5.0)
    assert coarse["beta int8-static"].build_s == pytest.approx(4.0)
    on_gpu = candidates([ALPHA], situation(device="cuda:1"), eager_ms=50.0)
    gpu = {c.family: c for c in on_gpu if c.coarse}
    assert gpu["alpha bf16"].expected_ms == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("precision", "features", "legal"),
    [
        ("fp32", (), True),
        ("bf16", ("avx2", "fma"), False),
        ("bf16", ("amx_bf16",), True),
        ("bf16", ("bf16",), True),
        ("fp16", AMX, False),  # runs at fp32's rate: a trap
        ("fp16", ("amx_fp16",), True),
        ("int8", ("avx512f",), False),
        ("int8", ("neon_dot",), True),
        ("tf32", AMX, False),
        ("fp8", AMX, False),
    ],
)
def test_cpu_precisions(precision: str, features: tuple[str, ...], legal: bool) -> None:
    reason = why_not_precision(precision, situation(features=features))  # type: ignore[arg-type]
    assert (reason == "") == legal


@pytest.mark.parametrize(
    ("precision", "capability", "legal"),
    [
        ("bf16", "7.5", False),
        ("bf16", "8.0", True),
        ("fp16", "6.1", False),
        ("fp16", "7.0", True),
        ("tf32", "8.6", True),
        ("fp8", "8.6", False),
        ("fp8", "8.9", True),
        ("fp8", "12.0", True),
        ("int8", "7.5", True),
        ("bf16", None, True),
        ("bf16", "unreadable", True),
    ],
)
def test_gpu_precisions(precision: str, capability: str | None, legal: bool) -> None:
    here = situation(device="cuda:0", capability=capability)
    assert (why_not_precision(precision, here) == "") == legal  # type: ignore[arg-type]


def test_quantised_plans_need_someone_to_accept_them_and_calibration() -> None:
    nobody = candidates([BETA], situation(accepts_quantised=False))
    assert "labelled data" in why_not(nobody, "beta int8-static")
    assert "labelled data" in why_not(nobody, "beta int8-weight")
    assert not any(c.plan.quantized for c in tryable(nobody))

    uncalibrated = candidates([BETA], situation(calibration_samples=0))
    assert "calibration" in why_not(uncalibrated, "beta int8-static")
    assert any(c.family == "beta int8-weight" for c in tryable(uncalibrated))

    assert why_not_scheme("int8-dynamic", situation(features=("avx2",)))
    assert not why_not_scheme("int8-weight", situation(features=("avx2",)))


def test_a_quantised_plan_says_how_it_is_calibrated() -> None:
    found = tryable(candidates([BETA], situation()))
    static = next(c.plan for c in found if c.family == "beta int8-static")
    weight = next(c.plan for c in found if c.family == "beta int8-weight")
    assert static.precision == weight.precision == "int8"
    assert static.quantization is not None
    assert weight.quantization is not None
    assert static.quantization.calibration_samples == 64
    assert weight.quantization.calibration_samples == 0
    assert static.title != weight.title


def test_an_absent_backend_is_one_line_with_its_install_command() -> None:
    found = candidates([ALPHA, BETA], situation(present=frozenset({"alpha"})))
    absent = [c for c in found if c.plan.backend == "beta"]
    assert len(absent) == 1
    assert absent[0].why_not == "beta is not installed (pip install beta)"
    reasons = {"beta": "no C++ compiler"}
    found = candidates([BETA], situation(present=frozenset(), why_absent=reasons))
    assert found[0].why_not == "no C++ compiler (pip install beta)"


def test_a_backend_of_another_device_is_not_mentioned() -> None:
    found = candidates([ALPHA, BETA], situation(device="cuda:0"))
    assert {c.plan.backend for c in found} == {"alpha"}
    assert {c.plan.device for c in found} == {"cuda:0"}


def test_channels_last_only_for_images_and_then_first() -> None:
    flat = tryable(candidates([ALPHA], situation()))
    assert {c.plan.memory_layout for c in flat} == {"contiguous"}
    images = tryable(candidates([ALPHA], situation(images=True)))
    assert {c.plan.memory_layout for c in images} == {"contiguous", "channels_last"}
    assert all(c.plan.memory_layout == "channels_last" for c in images if c.coarse)


def test_options_appear_where_they_make_sense_and_defaults_stay_unwritten() -> None:
    on_cpu = tryable(candidates([ALPHA], situation()))
    assert not any("graphs" in c.plan.options for c in on_cpu)
    assert not any("autocast" in c.plan.options for c in on_cpu if c.plan.precision == "fp32")
    assert any(c.plan.options == {"autocast": True} for c in on_cpu)
    assert all(c.plan.options == {} for c in on_cpu if c.coarse)
    on_gpu = tryable(candidates([ALPHA], situation(device="cuda:0")))
    assert any(c.plan.options == {"graphs": True} for c in on_gpu if c.plan.precision == "fp32")
    everything = tryable(candidates([BETA], situation()))
    fp32 = [c.plan.options for c in everything if c.family == "beta fp32" and not c.plan.threads]
    assert len(fp32) == 2 * 3
    assert {"pin": False, "level": 1} in fp32


def test_a_backend_that_compiles_for_one_batch_is_told_which() -> None:
    spec = replace(BETA, options={}, batch_option="size")
    for plan in (c.plan for c in tryable(candidates([spec], situation(batch=8)))):
        assert plan.options == {"size": 8}
    assert any(c.coarse for c in candidates([spec], situation(batch=8)))
    fixed = tryable(candidates([spec], situation(batch=8, dynamic=False)))
    assert all(c.plan.options == {} for c in fixed)


def test_streams_and_threads_divide_the_cores() -> None:
    found = tryable(candidates([BETA], situation(cores=12, batch=32, objective="throughput")))
    splits = {(c.plan.streams, c.plan.threads) for c in found}
    assert splits == {(1, 0), (1, 1), (1, 6), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)}
    small = tryable(candidates([BETA], situation(cores=12, batch=3)))
    assert {c.plan.streams for c in small} == {1, 2, 3}


@pytest.mark.parametrize("changes", [{"batch": 1}, {"batch": 32, "dynamic": False}])
def test_a_batch_that_cannot_be_divided_is_not(changes: dict[str, object]) -> None:
    found = tryable(candidates([BETA], situation(cores=8, **changes)))
    assert {(c.plan.streams, c.plan.sub_batch) for c in found} == {(1, 0)}


def test_sub_batches_are_smaller_than_the_share_of_a_stream() -> None:
    found = tryable(candidates([BETA], situation(batch=32)))
    assert {c.plan.sub_batch for c in found if c.plan.streams == 1} == {0, 1, 4, 16}
    assert {c.plan.sub_batch for c in found if c.plan.streams == 2} == {0, 1, 4}


def test_what_cannot_be_exported_runs_only_as_its_baselines_do() -> None:
    found = candidates([ALPHA, BETA], situation(exported=False, images=True))
    assert "cannot be exported" in why_not(found, "beta fp32")
    assert {c.plan.backend for c in tryable(found)} == {"alpha"}
    assert all(c.plan.options == {"source": True} for c in tryable(found))
    assert {c.plan.memory_layout for c in tryable(found)} == {"contiguous", "channels_last"}


def test_a_baseline_that_is_also_a_coarse_plan_is_listed_once() -> None:
    spec = BackendSpec(
        name="plain",
        install="",
        packages=(),
        precisions={"cpu": ("fp32",)},
        baselines=(Plan(backend="plain"),),
    )
    found = candidates([spec], situation(cores=1, present=frozenset({"plain"})))
    assert len(found) == 1
    assert found[0].baseline
    assert found[0].coarse


def test_a_baseline_without_instructions_is_said_and_not_tried() -> None:
    found = candidates([ALPHA], situation(features=("avx2",)))
    bf16 = [c for c in found if c.baseline and c.plan.precision == "bf16"]
    assert len(bf16) == 1
    assert "no instructions" in bf16[0].why_not


def test_one_changed_decision() -> None:
    plan = Plan(backend="beta", options={"pin": False})
    change = only_change(plan, plan.with_(streams=2, threads=1))
    assert change is not None
    assert change == ("split", (1, 0), (2, 1))
    unpinned = only_change(plan, plan.with_(options={}))
    assert unpinned is not None
    assert unpinned.name == "option pin"
    assert only_change(plan, plan) is None
    assert only_change(plan, plan.with_(sub_batch=4, options={})) is None


@given(
    cores=st.integers(1, 64),
    batch=st.integers(1, 64),
    images=st.booleans(),
    dynamic=st.booleans(),
    exported=st.booleans(),
    accepts=st.booleans(),
    samples=st.sampled_from([0, 64]),
    features=st.sets(st.sampled_from(AMX)),
    device=st.sampled_from(["cpu", "cuda:0"]),
    present=st.sets(st.sampled_from(["alpha", "beta"])),
)
def test_whatever_is_listed_is_legal(**drawn: object) -> None:
    drawn["features"] = tuple(drawn["features"])  # type: ignore[arg-type]
    drawn["accepts_quantised"] = drawn.pop("accepts")
    drawn["calibration_samples"] = drawn.pop("samples")
    here = situation(**(drawn | {"present": frozenset(drawn["present"])}))  # type: ignore[call-overload]
    found = candidates([ALPHA, BETA], here, eager_ms=3.0)
    for candidate in tryable(found):
        plan = candidate.plan
        assert plan.backend in here.present
        assert plan.device == here.device
        assert plan.streams * max(1, plan.threads) <= here.cores
        assert plan.streams <= here.batch
        assert plan.streams == 1 or here.dynamic
        assert plan.memory_layout == "contiguous" or here.images
        assert not plan.quantized or here.accepts_quantised
        assert 0 < candidate.expected_ms < math.inf
        assert family(plan) == candidate.family
        assert "split" in decisions(plan)
    coarse = [c.family for c in tryable(found) if c.coarse]
    assert len(coarse) == len(set(coarse))
    assert {c.family for c in tryable(found) if not c.baseline} <= set(coarse)


@pytest.mark.parametrize(
    ("lowest", "left"),
    [
        ("fp32", {"fp32"}),
        ("tf32", {"fp32", "tf32"}),
        ("fp16", {"fp32", "tf32", "fp16"}),
        ("bf16", {"fp32", "tf32", "fp16", "bf16"}),
    ],
)
def test_the_lowest_precision_bounds_what_is_tried(lowest: str, left: set[str]) -> None:
    here = situation(device="cuda:0", capability="9.0", lowest=lowest, accepts_quantised=True)
    legal = {p for p in ("fp32", "tf32", "fp16", "bf16") if not why_not_precision(p, here)}
    assert legal == left
    assert ("--precision" in why_not_scheme("int8", here)) == (lowest != "bf16")
    baselines = [c for c in candidates([ALPHA, BETA], here) if c.baseline and not c.why_not]
    assert {c.plan.precision for c in baselines} <= left
