"""Zeus: time of an epoch and mean power of training jobs by batch and power limit."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.predictor import models
from benchmarks.predictor.data import gpu, rows
from benchmarks.predictor.errors import Steps, compact
from benchmarks.predictor.jobs import Step, ids, vision
from benchmarks.predictor.works import captured
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.work import Work
from suanli.cost.parameters import Parameters
from suanli.cost.power_draw import mean_power_w, slowdown
from suanli.cost.predictor import moved_bytes
from suanli.cost.work_kernels import How, kernels_of

_CARDS = {"p100": "Tesla P100 PCIe 16GB", "v100": "Tesla V100 PCIe 32GB"}


# Samples in an epoch of the data sets whose size is published.
_SAMPLES = {"imagenet": 1281167, "cifar100": 50000}


@dataclass(frozen=True, kw_only=True)
class FreeRow:
    """One job at one batch under the card's own limit, in fp32, with its graph.

    Attributes:
        epoch_s: Seconds of a pass over the data.
        seconds: Of one step; None where the number of samples is not published.
    """

    job: str
    gpu: GpuSheet
    work: Work
    epoch_s: float
    seconds: float | None
    power_w: float


@cache
def free_rows() -> tuple[FreeRow, ...]:
    """ResNet-50, BERT-base (SQuAD, 384 tokens) and ShuffleNet v2 by batch and optimiser."""
    made = []
    for short, card in _CARDS.items():
        for row in rows(f"zeus_power_{short}.csv"):
            data, network, batch = row["dataset"], row["network"], int(row["batch_size"])
            built = network in ("resnet50", "shufflenetv2") or data == "squad"
            if not built or float(row["power_limit"]) < 250:
                continue
            epoch_s, samples = float(row["time_per_epoch"]), _SAMPLES.get(data)
            made.append(
                FreeRow(
                    job=f"{network} {batch} {row['optimizer']}",
                    gpu=gpu(card),
                    work=_graph(network, batch),
                    epoch_s=epoch_s,
                    seconds=epoch_s * batch / samples if samples else None,
                    power_w=float(row["average_power"]),
                )
            )
    return tuple(made)


@cache
def zeus_steps() -> tuple[Step, ...]:
    """Those whose number of samples is published, as steps."""
    return tuple(_as_step(row, row.seconds) for row in free_rows() if row.seconds)


_FP32 = How(dtype="fp32")


def _as_step(row: FreeRow, seconds: float) -> Step:
    return Step(data="Zeus", job=row.job, gpu=row.gpu, how=_FP32, work=row.work, seconds=seconds)


def _graph(network: str, batch: int) -> Work:
    """The graph; Adadelta keeps two numbers for each weight, as Adam does, which stands for it."""
    make: Callable[[], Any]
    if network == "resnet50":
        make = functools.partial(models.Residual, (3, 4, 6, 3))
        return vision("zeus resnet", make, 224, batch, training=True, optimizer="adam")
    if network == "shufflenetv2":
        make = models.ShuffleNet
        return vision("zeus shuffle", make, 32, batch, training=True, optimizer="adam")

    def build() -> dict[str, Any]:
        make = models.hub("BertConfig", "BertForQuestionAnswering", attention="eager")
        kwargs = {
            "input_ids": ids(batch, 384),
            "start_positions": ids(batch),
            "end_positions": ids(batch),
        }
        return {
            "model": make(),
            "kwargs": kwargs,
            "batch": batch,
            "training": True,
            "optimizer": "adamw",
        }

    return captured(f"zeus bert-base {batch}", build)


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


class Powers:
    """Jobs under the card's own limit, ready to be priced in watts."""

    def __init__(self, found: Sequence[FreeRow]) -> None:
        self._rows = found
        self._kernels = [compact(kernels_of(row.work, _FP32)) for row in found]
        self._flops = [row.work.matmul_flops for row in found]
        self._steps = Steps([_as_step(row, row.seconds or 1.0) for row in found])

    def errors(self, p: Parameters) -> Any:
        """log(predicted / measured) of mean power, each job as long as it is predicted to be."""
        return np.log(
            [
                (watts or 1.0) / row.power_w
                for watts, row in zip(self.watts(p), self._rows, strict=True)
            ]
        )

    def watts(self, p: Parameters) -> list[float | None]:
        """Predicted mean power of each."""
        found = []
        for i, (seconds, waits) in enumerate(zip(*self._steps.seconds(p), strict=True)):
            moved = float(np.sum(moved_bytes(self._kernels[i], p)))
            watts = mean_power_w(
                self._rows[i].gpu,
                p.clock,
                flops_per_s=self._flops[i] / seconds,
                bytes_per_s=moved / seconds,
                unit="vector",
                busy=1.0 - waits,
            )
            found.append(watts)
        return found
