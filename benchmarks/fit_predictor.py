"""Fits the predictor's parameters to published measurements and writes them into the package.

    SUANLI_DATA=... python -m benchmarks.fit_predictor [--check]

Stages, each keeping what the one before found: single operators (NeuSight fp32 products, softmax,
layer norm on P100, V100, T4, A100; vidur's Llama layers in fp16 on A100; best measured products on
A100 to GB200); whole models on one card (DeepLearningExamples, timm); transfers (NCCL tables of
vTrain and vidur); layouts (vTrain, MPT); power (Zeus). Every number has a prior with a width, so
that what data do not say stays where physics or the makers put it. See docs/predict-model.md.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from benchmarks.predictor import data, jobs, layouts, training_jobs, transfers
from benchmarks.predictor.data import OperatorSet
from benchmarks.predictor.fitting import FILE, Knob, as_parameters, fit, stored
from benchmarks.predictor.zeus import power_errors, power_rows, zeus_steps
from suanli.base.prediction import ParallelLayout
from suanli.cost.kernel_time import joined
from suanli.cost.parameters import Parameters
from suanli.cost.predictor import how_of, kernel_terms, step_seconds
from suanli.cost.scaling import predict_parallel
from suanli.cost.work_kernels import Kernels, kernels_of

File = dict[str, Any]
# Shortest time that NeuSight's way to measure can show: its host calls a kernel this often.
_SHORTEST_S = 3e-5


def _knob(*path: str, prior: float, width: float = 0.5) -> Knob:
    return Knob(path=path, prior=prior, width=width)


OPERATOR_KNOBS: tuple[Knob, ...] = (
    *(
        _knob("products", unit, name, prior=prior)
        for unit, sizes in (("vector", (10.0, 8.0)), ("tensor", (20.0, 100.0)))
        for name, prior in (
            ("tile_half", sizes[0]),
            ("sum_fill", sizes[1]),
            ("cache_gain", 2.5),
            ("cache_share", 0.4),
            ("overlap", 4.0),
        )
    ),
    _knob("product_fraction", "vector", prior=0.95, width=0.05),
    _knob("product_fraction", "tensor", prior=0.9, width=0.05),
    _knob("bandwidth_fraction", prior=0.8, width=0.1),
    _knob("rows", "cache_share", prior=0.5),
    _knob("rows", "padding", prior=0.4),
    _knob("kernel_s", prior=4e-6),
    _knob("clock", "exponent", prior=0.6, width=0.15),
    *(
        _knob("clock", "w_per_vector_tflop", capability, prior=watts, width=0.1)
        for capability, watts in (("6.0", 16.0), ("7.0", 14.0), ("7.5", 14.0), ("8.0", 11.7))
    ),
    *(
        _knob("clock", "tensor_gain", capability, prior=gain, width=0.3)
        for capability, gain in (("8.0", 16.0), ("9.0", 24.0), ("10.0", 32.0))
    ),
    *(
        _knob("capability", capability, name, prior=1.0, width=0.06)
        for capability in ("6.0", "7.0", "7.5", "8.0")
        for name in ("product", "bandwidth")
    ),
)
STEP_KNOBS: tuple[Knob, ...] = (
    _knob("convolution_fraction", "vector", prior=0.95, width=0.3),
    _knob("convolution_fraction", "tensor", prior=0.75, width=0.3),
    _knob("gradient_fraction", prior=0.85, width=0.2),
    _knob("grouped_fraction", prior=0.25),
    _knob("layout_fraction", prior=0.9, width=0.3),
    _knob("layout_traffic", prior=2.0, width=0.3),
    _knob("layout_gradient_traffic", prior=3.0, width=0.3),
    _knob("fused_traffic", prior=0.45, width=0.4),
    _knob("recurrent_step_s", prior=1.2e-5),
    _knob("warm_loss", "vector", prior=0.05, width=0.7),
    _knob("uncorrected_gain", prior=1.1, width=0.1),
    _knob("grouped_gradient_fraction", prior=0.15),
    _knob("depthwise_fraction", prior=0.25),
    _knob("depthwise_gradient_fraction", prior=0.15),
    _knob("winograd_gain", prior=1.6, width=0.2),
    _knob("host_forward_s", prior=3e-5, width=0.3),
    _knob("host_backward_s", prior=4e-5, width=0.3),
    _knob("host_update_s", prior=4e-5),
    _knob("host_generation", prior=1.25, width=0.15),
    *(
        _knob("capability", capability, name, prior=1.0, width=width)
        for capability in ("7.0", "8.0", "8.6", "8.9")
        for name, width in (("tensor", 0.12), ("bandwidth", 0.1))
    ),
    _knob("clock", "raised", prior=1.1, width=0.1),
)
LINK_KNOBS: tuple[Knob, ...] = (
    _knob("links", "share", "nvlink", prior=0.8, width=0.05),
    _knob("links", "share", "nvlink_mesh", prior=0.8, width=0.1),
    _knob("links", "small_group", prior=0.28),
    _knob("links", "piece_s", prior=4e-6),
    _knob("links", "start_s", prior=2.5e-5),
    _knob("links", "step_s", prior=6e-6),
    _knob("links", "start_overlap", prior=3.0),
)
LAYOUT_KNOBS: tuple[Knob, ...] = (
    _knob("attention_fraction", "tensor", prior=0.6),
    _knob("warm_loss", "tensor", prior=0.15, width=0.7),
    _knob("overlap", prior=0.8, width=0.2),
    _knob("update_traffic", prior=1.6, width=0.4),
)
POWER_KNOBS: tuple[Knob, ...] = (
    _knob("clock", "limit_floor", prior=0.33),
    _knob("clock", "limit_exponent", prior=0.15),
    _knob("clock", "limit_reached", prior=0.93, width=0.05),
)


def operator_errors(found: OperatorSet, p: Parameters) -> Any:
    """log(predicted / measured) of each row."""
    terms = kernel_terms(found.kernels, found.gpu, p, found.dtype, alone=True)
    seconds = joined(p.products["vector"], terms[0], terms[1]) + terms[2]
    if found.name in ("linear", "bmm", "softmax", "ln"):
        seconds = np.maximum(seconds, _SHORTEST_S)
    return np.log(seconds / found.seconds)


_KERNELS: dict[int, Kernels] = {}


def step_error(step: jobs.Step, p: Parameters) -> float:
    """log(predicted / measured) of a whole step."""
    if id(step) not in _KERNELS:
        _KERNELS[id(step)] = compact(kernels_of(step.work, step.how))
    kernels = _KERNELS[id(step)]
    terms = kernel_terms(kernels, step.gpu, p, step.how.dtype)
    device_s, idle_s = step_seconds(kernels, terms, step.gpu, p)
    return math.log((device_s + idle_s) / step.seconds)


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
    answer = predict_parallel(
        found.work,
        found.gpu,
        layout or found.layout,
        dtype=found.dtype,
        how=how_of(found.work, found.dtype, "eager", autocast=found.autocast, channels_last=None),
        fabric=found.fabric,
        constants=p,
    )
    return math.log(answer.step_ms.p50 * 1e-3 / found.seconds)


def sample(found: OperatorSet, most: int, seed: int = 0) -> OperatorSet:
    """At most so many rows of a set, always the same ones."""
    if len(found.seconds) <= most:
        return found
    keep = np.sort(np.random.default_rng(seed).permutation(len(found.seconds))[:most])
    columns = {name: column[keep] for name, column in found.kernels.columns.items()}
    kernels = dataclasses.replace(found.kernels, columns=columns)
    return dataclasses.replace(found, kernels=kernels, seconds=found.seconds[keep])


def few(rows: Sequence[Any], most: int, seed: int = 0) -> list[Any]:
    """At most so many entries, always the same ones."""
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    return [rows[int(i)] for i in sorted(order)]


def fit_operators(start: File, without: Collection[str] = (), most: int = 60) -> File:
    """Stage 1, without the cards named."""
    sets = [
        sample(found, most)
        for found in (
            *data.neusight_operators(),
            *data.vidur_operators(),
            *data.matmul_ceilings(),
        )
        if found.gpu.name not in without
    ]
    return fit(start, OPERATOR_KNOBS, lambda p: [operator_errors(s, p) for s in sets], steps=8)


def fit_steps(start: File, without: Collection[str] = (), most: int = 60) -> File:
    """Stage 2, without the cards named."""
    groups = [
        few([s for s in rows if s.gpu.name not in without], most)
        for rows in (
            training_jobs.published_steps(),
            jobs.timm_steps(),
            jobs.timm_training_steps(),
            jobs.torchvision_steps(),
            zeus_steps(),
        )
    ]
    return fit(
        start,
        STEP_KNOBS,
        lambda p: [np.array([step_error(s, p) for s in rows]) for rows in groups if rows],
        steps=6,
    )


def fit_links(start: File, names: Collection[str]) -> File:
    """Stage 3, from the tables named."""
    tables = [_thinned(t) for t in transfers.all_reduces() if t.name in names]
    return fit(
        start,
        LINK_KNOBS,
        lambda p: [np.log(transfers.predicted(t, p) / t.seconds) for t in tables],
        steps=8,
    )


def _thinned(table: transfers.Transfers, count: int = 40) -> transfers.Transfers:
    """Sizes in about equal ratios."""
    order = np.argsort(table.n_bytes)
    keep = order[np.unique(np.geomspace(1, len(order), count).astype(int)) - 1]
    return dataclasses.replace(table, n_bytes=table.n_bytes[keep], seconds=table.seconds[keep])


def fit_layouts(start: File, rows: Sequence[layouts.Spread], extra: Sequence[Knob] = ()) -> File:
    """Stage 4, from these rows."""
    return fit(
        start,
        (*LAYOUT_KNOBS, *extra),
        lambda p: [np.array([layout_error(r, p) for r in rows])],
        steps=8,
    )


def fit_power(start: File, cards: Collection[str]) -> File:
    """Stage 5, from Zeus on these cards."""
    rows = [row for row in power_rows() if row.gpu.name in cards]
    return fit(start, POWER_KNOBS, lambda p: power_errors(rows, p), steps=12)


def fit_all(start: File, say: Callable[[str], None] = print) -> File:
    """All stages on all data."""
    links = [t.name for t in transfers.all_reduces()]
    stages: list[tuple[str, Callable[[File], File]]] = [
        ("operators", fit_operators),
        ("transfers", lambda d: fit_links(d, links)),
        ("layouts", lambda d: fit_layouts(d, few(layouts.mpt_steps(), 80))),
        ("steps", fit_steps),
        ("power", lambda d: fit_power(d, {row.gpu.name for row in power_rows()})),
    ]
    for name, stage in stages:
        began = time.monotonic()
        start = stage(start)
        say(f"{name}: {time.monotonic() - began:.1f} s")
    return start


def rounded(value: Any) -> Any:
    """Three digits are more than the data hold."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fit, but do not write")
    options = parser.parse_args()
    fitted = rounded(fit_all(stored()))
    as_parameters(fitted)
    text = json.dumps(fitted, indent=2) + "\n"
    if options.check:
        print(text)
    else:
        FILE.write_text(text, encoding="utf-8")
        print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
