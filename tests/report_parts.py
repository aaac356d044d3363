"""Results with everything that a page has to show, and names as an attacker would choose them."""

import math
import random
from dataclasses import replace
from typing import Any

from suanli.base import schema
from suanli.base.hardware import Ceiling
from suanli.base.profile_results import (
    Advice,
    LostTime,
    MemoryProfile,
    OperatorProfile,
    ProfilerCost,
    ProfileResult,
    SlowStep,
    Stability,
    StepTimes,
    TraceEvent,
)
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainProgress, TrainQuality, TrainResult
from suanli.base.work import SpeedOfLight
from tests.planted_results import DEVICE, ENVIRONMENT, ceilings, estimate, trials

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e{{7*7}}"

_KINDS = (
    ("convolution", 2_300e6, 4e6, "compute"),
    ("batch_norm", 4e6, 6e6, "memory"),
    ("relu", 1e6, 5e6, "memory"),
    ("add", 1e6, 7e6, "memory"),
    ("view", 0, 0, "overhead"),
)


def operators(count: int = 120) -> tuple[OperatorProfile, ...]:
    """Operators of a network with some spread, by time."""
    draw = random.Random(7)
    found = []
    for index in range(count):
        name, flops, size, bound = _KINDS[index % len(_KINDS)]
        scale = math.exp(draw.uniform(-1.5, 1.5))
        sol_ms = max(flops / 0.9e12, size / 60e9) * 1e3 * scale
        time_ms = sol_ms * math.exp(draw.uniform(0.3, 2.0)) + 0.004
        found.append(
            OperatorProfile(
                name=name,
                module=EVIL if index == 0 else f"layer{index // 30}.{index // 5 % 6}.{name}{index}",
                source=f"model.py:{index + 10}",
                count=1 + index % 3,
                time_ms=time_ms,
                flops=int(flops * scale),
                bytes=int(size * scale),
                bound_by=bound,  # type: ignore[arg-type]
                sol_ms=sol_ms,
                lost_ms=time_ms - sol_ms,
                intensity=flops / size if size else None,
                flops_per_s=flops * scale / time_ms * 1e3 if flops else None,
                bytes_per_s=size * scale / time_ms * 1e3 if size else None,
                fused=("convolution", "relu") if index == 5 else (),
            )
        )
    total = sum(o.time_ms for o in found)
    found.sort(key=lambda o: -o.time_ms)
    return tuple(replace(o, share=o.time_ms / total * 0.94) for o in found)


def profile_result(count: int = 120, **changes: Any) -> ProfileResult:
    """A profile of an inference step."""
    ops = operators(count)
    busy = sum(o.time_ms for o in ops)
    step = busy / 0.94
    best = sum(o.sol_ms or 0.0 for o in ops)
    events, now = [], 0.0
    for index, op in enumerate(ops):
        events.append(
            TraceEvent(
                name=f"aten::{op.name}",
                track="host",
                start_ms=now,
                duration_ms=op.time_ms,
                operator=index,
                phase="forward",
            )
        )
        now += op.time_ms + step * 0.06 / count
    events.append(TraceEvent(name="forward", track="phase", start_ms=0.0, duration_ms=now))
    lost = step - best
    result = ProfileResult(
        schema=schema.name("profile"),
        verb="profile",
        workload=EVIL,
        device=DEVICE,
        environment=ENVIRONMENT,
        subject="workload",
        training=False,
        batch=8,
        plan=TrainPlan(),
        step_ms=estimate(step),
        samples_per_s=8e3 / step,
        sol=SpeedOfLight(
            ms=best, bound_by="compute", compute_ms=best, memory_ms=best / 3, fraction=best / step
        ),
        verdict="compute-bound: 61 % of the step is convolutions in fp32",
        bound_by="compute",
        categories=StepTimes(forward_ms=busy, data_ms=step * 0.02, idle_ms=step * 0.04),
        operators=ops,
        lost=(
            LostTime(cause="slow convolutions", bound_by="compute", ms=lost * 0.55),
            LostTime(
                cause="memory traffic that fusion would avoid", bound_by="memory", ms=lost * 0.3
            ),
            LostTime(cause="launches and Python", bound_by="overhead", ms=lost * 0.12),
            LostTime(cause="waiting for data", bound_by="data", ms=lost * 0.03),
        ),
        advice=(
            Advice(
                change="run the products in bf16",
                kind="precision",
                reason="fp32 on AMX tiles",
                how="--plan bf16.json",
                expected_speedup=4.2,
                measured_speedup=estimate(3.9),
            ),
            Advice(
                change="channels_last",
                kind="layout",
                reason="NCHW is copied",
                how=EVIL,
                expected_speedup=1.3,
                failed="out of memory",
            ),
        ),
        memory=MemoryProfile(
            weights_bytes=100 << 20,
            gradients_bytes=0,
            optimizer_bytes=0,
            activations_bytes=60 << 20,
            workspace_bytes=5 << 20,
            total_bytes=165 << 20,
            process_bytes=900 << 20,
        ),
        stability=Stability(
            steps=50,
            spread=0.02,
            slowest_ms=step * 2,
            outliers=(SlowStep(step=3, ms=step * 2, cause="garbage collection"),),
        ),
        profiler=ProfilerCost(step_ms=step * 1.06, cost=0.06),
        energy_j=None,
        ceilings=roof(),
        flops=sum(o.flops for o in ops),
        parameters=25_557_032,
        seconds_spent=12.0,
        trace=tuple(events),
        notes=(EVIL,),
    )
    return replace(result, **changes)


def roof() -> tuple[Ceiling, ...]:
    """Ceilings under which the operators above fit."""
    scaled = {"fp32": 20.0, "bf16": 3.0, "int8": 0.5}
    return tuple(
        replace(item, hardware=item.hardware * scaled.get(item.dtype or "", 1.0))
        if item.hardware
        else item
        for item in ceilings().items
    )


def history(count: int = 300) -> tuple[TrainProgress, ...]:
    """The course of a run."""
    return tuple(
        TrainProgress(
            step=10 * i,
            steps=10 * count,
            epoch=1 + i * 6 // count,
            epochs=6,
            done=i / count,
            loss=2.3 * math.exp(-3 * i / count) + 0.1 * math.sin(i),
            samples_per_s=1800 - 300 * math.exp(-i / 20),
            seconds=0.9 * i,
            quality=None if i < 50 else round(0.5 + 0.42 * (i // 50 * 50 / count) ** 0.5, 4),
        )
        for i in range(1, count + 1)
    )


def train_result(**changes: Any) -> TrainResult:
    """A run that reached its target."""
    result = TrainResult(
        schema=schema.name("train"),
        verb="train",
        workload="cifar10-fast",
        device=DEVICE,
        environment=ENVIRONMENT,
        plan=TrainPlan(precision="bf16", memory_layout="channels_last"),
        hyper_parameters={"lr": 0.1, "optimizer": EVIL},
        as_written=True,
        batch=128,
        seed=0,
        step_ms=estimate(71.0),
        samples_per_s=1801.0,
        sol=None,
        mfu=0.4,
        loss=0.3,
        quality=TrainQuality(
            metric="accuracy", value=0.9092, search=0.91, n=5000, target=0.9083, reached_at_s=240.0
        ),
        epochs=6.0,
        steps=3000,
        train_seconds=277.6,
        seconds_spent=320.0,
        stopped="epochs",
        resumed_from=None,
        run_dir="no-such-folder",
        checkpoint=None,
        weights=None,
        trials=trials(),
        speedup=estimate(3.3),
        baseline="eager fp32",
        ceilings=roof(),
        flops=10**11,
        parameters=2_000_000,
    )
    return replace(result, **changes)
