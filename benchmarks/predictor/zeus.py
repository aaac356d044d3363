"""Zeus: time of an epoch and mean power of training jobs by batch and power limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.predictor.data import gpu, rows
from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.parameters import Parameters
from suanli.cost.power_draw import slowdown

_CARDS = {"p100": "Tesla P100 PCIe 16GB", "v100": "Tesla V100 PCIe 32GB"}


@dataclass(frozen=True, kw_only=True)
class PowerRow:
    """One job under one power limit, beside the same job under the card's own limit."""

    job: str
    gpu: GpuSheet
    limit_w: float
    seconds: float
    power_w: float
    free_seconds: float
    free_power_w: float


@cache
def power_rows() -> tuple[PowerRow, ...]:
    """All jobs under all limits below the card's own."""
    found = []
    for short, name in _CARDS.items():
        jobs: dict[str, dict[float, tuple[float, float]]] = {}
        for row in rows(f"zeus_power_{short}.csv"):
            job = " ".join(row[c] for c in ("dataset", "network", "batch_size", "optimizer"))
            measured = float(row["time_per_epoch"]), float(row["average_power"])
            jobs.setdefault(job, {})[float(row["power_limit"])] = measured
        for job, limits in jobs.items():
            free = limits[max(limits)]
            found += [
                PowerRow(job=job, gpu=gpu(name), limit_w=limit, seconds=t, power_w=w,
                         free_seconds=free[0], free_power_w=free[1])
                for limit, (t, w) in limits.items()
                if limit < max(limits)
            ]  # fmt: skip
    return tuple(found)


def under_limit(row: PowerRow, p: Parameters) -> tuple[float, float]:
    """Predicted seconds and watts under the limit, from the job as it runs without."""
    factor = slowdown(row.gpu, p.clock, wanted_w=row.free_power_w, limit_w=row.limit_w)
    watts = min(row.free_power_w, p.clock.limit_reached * row.limit_w)
    return row.free_seconds * factor, watts


def power_errors(found: Sequence[PowerRow], p: Parameters) -> list[Any]:
    """log(predicted / measured) of time and of power."""
    pairs = [under_limit(row, p) for row in found]
    return [
        np.log([t / row.seconds for (t, _), row in zip(pairs, found, strict=True)]),
        np.log([w / row.power_w for (_, w), row in zip(pairs, found, strict=True)]),
    ]
