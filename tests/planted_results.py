"""Results of verbs written by hand, with everything in them that can be hard to show."""

import base64
from dataclasses import replace
from typing import Any

from suanli.base import schema
from suanli.base.hardware import (
    BackendStatus,
    Ceiling,
    Ceilings,
    CpuInfo,
    DeviceInfo,
    Environment,
    GpuInfo,
    Problem,
)
from suanli.base.plan import Plan, Quantization
from suanli.base.results import (
    Confirmation,
    DoctorResult,
    OptimizeResult,
    PublicKey,
    TimedPlan,
    TrustResult,
    WorkloadEntry,
    WorkloadsResult,
)
from suanli.base.timing import Estimate
from suanli.base.trial import OutputError, Quality, Trial, ValueCheck
from suanli.base.work import SpeedOfLight

DEVICE = DeviceInfo(
    name="cpu", title="Planted Processor, 2 cores", fingerprint="0" * 16, memory_bytes=2**34
)
ENVIRONMENT = Environment(
    suanli="0.1.0",
    python="3.11.7",
    os="Linux x86_64",
    machine="Planted Processor",
    cores=2,
    libraries={"torch": "2.13.0+cpu"},
)


def estimate(p50: float) -> Estimate:
    return Estimate(p50=p50, lo95=p50 * 0.98, hi95=p50 * 1.02)


EAGER = Plan(backend="eager", options={"source": True})
FAST = Plan(
    backend="openvino",
    precision="bf16",
    memory_layout="channels_last",
    streams=2,
    threads=1,
    quantization=Quantization(
        scheme="int8-static",
        keep=tuple(f"layer{i}.0.conv{i}" for i in range(9)),
        calibration_samples=64,
    ),
)
LONG = Plan(
    backend="inductor",
    precision="bf16",
    memory_layout="channels_last",
    options={"max_autotune_with_cuda_graphs_and_a_name_without_end": "x" * 60, "b": True},
)


def trials() -> tuple[Trial, ...]:
    """One of each status and more, in an order that is not the one to show."""
    return (
        Trial(plan=EAGER, status="verified", step_ms=estimate(54), baseline=True, samples_per_s=18),
        Trial(
            plan=LONG,
            status="failed",
            reason="RuntimeError: [bold]no[/bold] tiles [/] for 算力算力 "
            + "averylongwordwithoutanyspaces" * 6,
        ),
        Trial(
            plan=Plan(backend="inductor", precision="fp16"),
            status="rejected",
            reason="channel 7 is off by [red]1 %[/red]:\nmean signed error 3.4x eager's own",
            step_ms=estimate(3.1),
        ),
        Trial(plan=FAST, status="verified", step_ms=estimate(3.9), samples_per_s=256),
        Trial(
            plan=Plan(backend="eager", precision="bf16"),
            status="verified",
            step_ms=estimate(21.6),
            baseline=True,
            resumed=True,
        ),
        *(
            Trial(
                plan=Plan(backend="tensorrt", precision="fp16", options={"level": level}),
                status="skipped",
                reason="tensorrt not installed (pip install tensorrt-cu12)",
            )
            for level in range(7)
        ),
        *(
            Trial(
                plan=Plan(backend="onnxruntime", threads=n),
                status="skipped",
                reason=f"about {n} s needed, 3 s of the search's budget left",
                baseline=n == 1,
            )
            for n in range(1, 31)
        ),
        *(
            Trial(
                plan=Plan(backend="warp", threads=n),
                status="skipped",
                reason=f"the operator op{n}d is not known",
            )
            for n in range(1, 31)
        ),
    )


def quality() -> Quality:
    return Quality(
        metric="ranking_agreement",
        value=0.9833,
        reference=0.9861,
        drop_upper95=0.0061,
        budget=0.01,
        n=720,
        accepted=True,
        harmed=3,
        helped=1,
        alarms=("[b]seven[/b] lost 3.4 points of recall, three times the budget is 3.0",),
    )


def optimize_result(**changes: Any) -> OptimizeResult:
    """A result with every part filled."""
    races = [
        Confirmation(
            batch=batch,
            step_ms=estimate(3.9 * batch),
            samples_per_s=256.0,
            speedup_vs_eager=estimate(13.8) if batch == 1 else None,
            speedup_vs_best_baseline=estimate(5.5),
            baseline_ms=estimate(21.4 * batch),
            best_baseline=EAGER,
            note="" if batch == 1 else "not told apart from eager fp32 source at batch 32",
        )
        for batch in (1, 32)
    ]
    error = OutputError(
        name="logits",
        rms=1e-3,
        eager_rms=1e-3,
        max_abs=1e-2,
        eager_max_abs=1e-2,
        rms_ratio=1.04,
        max_ratio=1.0,
        bias_ratio=0.5,
        gain_ratio=0.5,
    )
    result = OptimizeResult(
        schema=schema.name("optimize"),
        verb="optimize",
        workload="my[model].py:net",
        device=DEVICE,
        environment=ENVIRONMENT,
        objective="latency",
        batch=1,
        max_batch=32,
        untrained=False,
        baseline=TimedPlan(plan=EAGER, step_ms=estimate(21.5), samples_per_s=46.5),
        chosen=TimedPlan(plan=FAST, step_ms=estimate(3.9), samples_per_s=256.4),
        speedup_vs_eager=estimate(13.8),
        speedup_vs_best_baseline=estimate(5.5),
        quality=quality(),
        values=ValueCheck(ok=True, k=2.0, outputs=(error,), batches=(1, 32)),
        sol=SpeedOfLight(
            ms=0.53,
            bound_by="compute",
            compute_ms=0.53,
            memory_ms=0.2,
            fraction=0.00431,
            marks=("measured", "derived"),
        ),
        trials=trials(),
        confirmations=tuple(races),
        engine_dir="my-engine",
        ceilings=(),
        flops=8_200_000_000,
        parameters=25_557_032,
        seconds_spent=118.4,
        notes=("the operator [conv1] was put back",),
    )
    return replace(result, **changes)


def ceilings() -> Ceilings:
    """Figures that no machine has, so that a test knows them again."""
    matmuls = [
        Ceiling(
            what="matmul", unit="FLOP/s", dtype=dtype, hardware=rate, achieved=rate / 3, spread=0.02
        )
        for dtype, rate in (("fp32", 123.0e9), ("bf16", 999.7e9), ("int8", 12.5e12))
    ]
    reads = [
        Ceiling(what="read", unit="B/s", hardware=80e9, working_set_bytes=2**n, spread=1.5)
        for n in (15, 20, 31)
    ]
    call = Ceiling(what="call_overhead", unit="s", achieved=3.5e-7, spread=0.03)
    return Ceilings(
        device=DEVICE,
        items=(*matmuls, *reads, call),
        threads=2,
        measured_at="2026-01-02T03:04:05+00:00",
    )


def doctor_result(**changes: Any) -> DoctorResult:
    """A machine with two cards, one of them catalogued, and a few problems."""
    cpu = CpuInfo(
        model="Planted [Xeon] Processor",
        architecture="x86_64",
        physical_cores=2,
        logical_cores=4,
        usable_cores=2,
        features=tuple(f"avx512_feature{i}" for i in range(12)),
        cache_bytes={"L1d": 49152, "L2": 2**21, "L3": 480 * 2**20},
        memory_bytes=2**34,
        memory_available_bytes=2**33,
    )
    gpus = tuple(
        GpuInfo(
            name="NVIDIA H200 141GB HBM3e in a very long enclosure",
            index=index,
            memory_bytes=150_754_820_096,
            compute_capability="9.0",
            multiprocessors=132,
            driver="580.65.06",
            power_limit_w=700.0,
            clock_mhz=1980,
            links=18,
        )
        for index in range(2)
    )
    items = tuple(
        replace(item, datasheet=989e9 if item.dtype == "bf16" else None, mark="derived")
        for item in ceilings().items
    )
    link = Ceiling(what="host_to_device", unit="B/s", hardware=55e9, working_set_bytes=2**28)
    result = DoctorResult(
        schema=schema.name("doctor"),
        verb="doctor",
        workload=None,
        device=DEVICE,
        environment=ENVIRONMENT,
        cpu=cpu,
        gpus=gpus,
        backends=(
            BackendStatus(
                name="eager", present=True, version="2.13.0+cpu", install="pip install torch"
            ),
            BackendStatus(
                name="tensorrt",
                present=False,
                version=None,
                install="pip install 'suanli[gpu]' tensorrt-cu12",
                reason="tensorrt and onnx and onnxscript not installed",
            ),
        ),
        problems=(
            Problem(
                what="torch is built for CUDA 13.0 [a], the driver runs at most 12.8, and so on",
                mend="pip install --force-reinstall torch --index-url "
                "https://download.pytorch.org/whl/cu126",
            ),
        ),
        ceilings=(*items, link),
        compiler="cc (Debian 12.2.0-14+deb12u1) 12.2.0",
        measured_at="2026-01-02T03:04:05+00:00",
    )
    return replace(result, **changes)


def workloads_result(*entries: WorkloadEntry) -> WorkloadsResult:
    """A list of workloads."""
    return WorkloadsResult(
        schema=schema.name("workloads"),
        verb="workloads",
        workload=None,
        device=DEVICE,
        environment=ENVIRONMENT,
        workloads=entries,
    )


def public_key(number: int) -> PublicKey:
    """A key of no private one."""
    return PublicKey(
        fingerprint=f"{number:016x}", public_key=base64.b64encode(bytes([number] * 32)).decode()
    )


def trust_result(**changes: Any) -> TrustResult:
    """Whose engines open."""
    result = TrustResult(
        schema=schema.name("trust"),
        verb="trust",
        workload=None,
        device=DEVICE,
        environment=ENVIRONMENT,
        own=public_key(0),
        trusted=(),
    )
    return replace(result, **changes)
