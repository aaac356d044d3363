"""How far predictions are off: log(predicted / measured) of operators, steps and layouts.

A fit asks for these some hundred times, so the kernels of everything that ran on one card in one
type are laid behind each other and priced in one go; equal kernels of a step are counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.predictor import jobs, layouts
from benchmarks.predictor.data import OperatorSet
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import ParallelLayout, StepPrediction
from suanli.cost.kernel_time import joined
from suanli.cost.parameters import Parameters
from suanli.cost.predictor import host_seconds, how_of, kernel_terms, waiting_s
from suanli.cost.scaling import predict_parallel
from suanli.cost.work_kernels import Kernels, kernels_of

# Shortest time that NeuSight's way to measure can show: its host calls a kernel this often.
_SHORTEST_S = 3e-5
_CALLED_OFTEN = ("linear", "bmm", "softmax", "ln")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pool:
    """Kernels of one card and type; `owner` says which entry each belongs to."""

    gpu: GpuSheet
    dtype: str
    kernels: Kernels
    owner: Any
    entries: tuple[int, ...]


def _pools(parts: Sequence[tuple[GpuSheet, str, Kernels]]) -> list[_Pool]:
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (gpu, dtype, _) in enumerate(parts):
        groups.setdefault((gpu.name, dtype), []).append(i)
    found = []
    for (_, dtype), entries in groups.items():
        tables = [parts[i][2].columns for i in entries]
        columns = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        owner = np.repeat(np.arange(len(entries)), [len(t["moved"]) for t in tables])
        found.append(
            _Pool(
                gpu=parts[entries[0]][0],
                dtype=dtype,
                kernels=Kernels(columns=columns),
                owner=owner,
                entries=tuple(entries),
            )
        )
    return found


class Operators:
    """Measured single operators, ready to be priced."""

    def __init__(self, sets: Sequence[OperatorSet]) -> None:
        self._sets = sets
        self._pools = _pools([(s.gpu, s.dtype, s.kernels) for s in sets])
        self._least = [_SHORTEST_S if s.name in _CALLED_OFTEN else 0.0 for s in sets]

    def errors(self, p: Parameters) -> list[Any]:
        """One array of log errors per set."""
        found: list[Any] = [None] * len(self._sets)
        for pool in self._pools:
            terms = kernel_terms(pool.kernels, pool.gpu, p, pool.dtype, alone=True)
            seconds = joined(p.products["vector"], terms[0], terms[1]) + terms[2]
            for place, i in enumerate(pool.entries):
                mine = np.maximum(seconds[pool.owner == place], self._least[i])
                found[i] = np.log(mine / self._sets[i].seconds)
        return found


class Steps:
    """Measured steps of one card each, ready to be priced."""

    def __init__(self, steps: Sequence[jobs.Step]) -> None:
        self._steps = steps
        kernels = [compact(kernels_of(s.work, s.how)) for s in steps]
        self._host = [dataclasses.replace(k, columns={}) for k in kernels]
        self._pools = _pools([(s.gpu, s.how.dtype, k) for s, k in zip(steps, kernels, strict=True)])
        self._seconds = np.array([s.seconds for s in steps])

    def errors(self, p: Parameters) -> Any:
        """Log errors of all steps, in their order."""
        return np.log(self.seconds(p)[0] / self._seconds)

    def seconds(self, p: Parameters) -> tuple[Any, Any]:
        """Predicted seconds of all steps, and the part of each in which the card waits."""
        total, idle = np.zeros(len(self._steps)), np.zeros(len(self._steps))
        for pool in self._pools:
            compute_s, memory_s, start_s = kernel_terms(pool.kernels, pool.gpu, p, pool.dtype)
            busy = joined(p.products["vector"], compute_s, memory_s) + start_s
            device = np.bincount(pool.owner, busy, minlength=len(pool.entries))
            for i, device_s in zip(pool.entries, device, strict=True):
                waits_s = waiting_s(float(device_s), host_seconds(self._host[i], pool.gpu, p))
                total[i], idle[i] = device_s + waits_s, waits_s / (device_s + waits_s)
        return total, idle


def compact(kernels: Kernels) -> Kernels:
    """The same step with equal kernels counted instead of repeated: as long, faster to price."""
    columns = dict(kernels.columns, operator=np.zeros_like(kernels["operator"]))
    names = [name for name in columns if name != "repeat"]
    rows = np.stack([columns[name] for name in names])
    unique, which = np.unique(rows, axis=1, return_inverse=True)
    repeat = np.bincount(which.ravel(), columns["repeat"])
    found = {name: unique[i] for i, name in enumerate(names)}
    return dataclasses.replace(kernels, columns={**found, "repeat": repeat})


def layout_error(
    found: layouts.Spread, p: Parameters, layout: ParallelLayout | None = None
) -> float:
    """log(predicted / measured) of a step on several cards."""
    return math.log(parallel(found, p, layout).step_ms.p50 * 1e-3 / found.seconds)


def parallel(
    found: layouts.Spread, p: Parameters, layout: ParallelLayout | None = None
) -> StepPrediction:
    """The prediction of a step on several cards."""
    return predict_parallel(
        found.work,
        found.gpu,
        layout or found.layout,
        dtype=found.dtype,
        how=how_of(found.work, found.dtype, "eager", autocast=found.autocast, channels_last=None),
        fabric=found.fabric,
        constants=p,
    )
