"""Fits the predictor's parameters to published measurements and writes them into the package.

    SUANLI_DATA=... python -m benchmarks.fit_predictor [--check]

Stages, each keeping what the one before found: single operators (NeuSight fp32 products, softmax,
layer norm on P100, V100, T4, A100; vidur's Llama layers in fp16 on A100; best measured products on
A100 to GB200); transfers (NCCL tables of vTrain and vidur); layouts (MPT); whole models on one card
(DeepLearningExamples, timm, residual networks, Zeus); power (Zeus). Every number has a prior with a
width, so that what data do not say stays where physics or the makers put it, and every fit starts
at the priors. All stages can leave a chip out, whatever card or data set it is in. See
docs/predict-model.md.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictor import data, jobs, layouts, training_jobs, transfers, zeus
from benchmarks.predictor.data import OperatorSet, of_chip
from benchmarks.predictor.errors import Operators, Steps, layout_error
from benchmarks.predictor.fitting import FILE, Knob, as_parameters, fit, stored

File = dict[str, Any]


# What Pascal reaches beside later cards. Products: its integer instructions (addresses, loops) take
# turns with those in fp32, where later multiprocessors have units of their own for them (an assumed
# tenth). Bandwidth: NVIDIA's whitepaper of the V100 states 1.5 times what Pascal delivers, of 1.23
# times the printed rate.
_LATER = {"product": 0.9, "bandwidth": 0.82}


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
    _knob("clock", "lowest_voltage", prior=0.75, width=0.1),
    *(
        _knob("clock", "w_per_vector_tflop", capability, prior=watts, width=0.1)
        for capability, watts in (("6.0", 16.0), ("7.0", 14.0), ("7.5", 14.0), ("8.0", 11.7))
    ),
    *(
        _knob("clock", "tensor_gain", capability, prior=gain, width=0.3)
        for capability, gain in (("8.0", 16.0), ("9.0", 24.0), ("10.0", 32.0))
    ),
    *(
        _knob("capability", capability, name, prior=_LATER[name] if old else 1.0, width=width)
        for capability, old in (("6.0", True), ("7.0", False), ("7.5", False), ("8.0", False))
        for name, width in (("product", 0.06), ("bandwidth", 0.06))
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
    _knob("uncorrected_gain", prior=1.15, width=0.1),
    _knob("grouped_gradient_fraction", prior=0.15),
    _knob("depthwise_fraction", prior=0.25),
    _knob("depthwise_gradient_fraction", prior=0.15),
    _knob("winograd_gain", prior=1.6, width=0.2),
    _knob("host_forward_s", prior=3e-5, width=0.3),
    _knob("host_backward_s", prior=4e-5, width=0.3),
    _knob("host_update_s", prior=4e-5),
    _knob("host_generation", prior=1.25, width=0.15),
    *(
        _knob("capability", capability, name, prior=1.0, width=0.06)
        for capability in ("7.0", "8.0", "8.6", "8.9")
        for name in ("tensor", "bandwidth")
    ),
    _knob("capability", "6.1", "product", prior=_LATER["product"], width=0.06),
    _knob("clock", "raised", prior=1.12, width=0.1),
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
    _knob("clock", "idle_share", prior=0.15, width=0.15),
    _knob("clock", "busy_share", prior=0.1),
    _knob("clock", "busy_w_per_gb_per_s", prior=0.13, width=0.15),
)


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


def unfitted() -> File:
    """The parameter file with every fitted number at its prior, so that it holds no measurement."""
    start = stored()
    start["capability"] = {}
    for knob in (*OPERATOR_KNOBS, *STEP_KNOBS, *LINK_KNOBS, *LAYOUT_KNOBS, *POWER_KNOBS):
        place = start
        for key in knob.path[:-1]:
            place = place.setdefault(key, {})
        place[knob.path[-1]] = knob.prior
    return start


def fit_operators(start: File, chip: str = "", most: int = 60) -> File:
    """Stage 1, without a chip."""
    sets = [
        sample(found, most)
        for found in (
            *data.neusight_operators(),
            *data.vidur_operators(),
            *data.matmul_ceilings(),
        )
        if not of_chip(found.gpu, chip)
    ]
    return fit(start, OPERATOR_KNOBS, Operators(sets).errors, steps=10)


def fit_links(start: File, names: Collection[str]) -> File:
    """Stage 2, from the tables named."""
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
    """Stage 3, from these rows."""
    return fit(
        start,
        (*LAYOUT_KNOBS, *extra),
        lambda p: [np.array([layout_error(r, p) for r in rows])],
        steps=6,
    )


def fit_steps(start: File, chip: str = "", most: int = 60) -> File:
    """Stage 4, without a chip."""
    groups = [
        few([s for s in rows if not of_chip(s.gpu, chip)], most)
        for rows in (
            training_jobs.published_steps(),
            jobs.timm_steps(),
            jobs.timm_training_steps(),
            jobs.torchvision_steps(),
            zeus.zeus_steps(),
        )
    ]
    steps = Steps([s for rows in groups for s in rows])
    ends = np.cumsum([len(rows) for rows in groups])[:-1]
    return fit(start, STEP_KNOBS, lambda p: np.split(steps.errors(p), ends), steps=8)


def fit_power(start: File, chip: str = "") -> File:
    """Stage 5, from Zeus without a chip."""
    limited = [row for row in zeus.power_rows() if not of_chip(row.gpu, chip)]
    free = zeus.Powers([row for row in zeus.free_rows() if not of_chip(row.gpu, chip)])
    return fit(
        start,
        POWER_KNOBS,
        lambda p: [*zeus.power_errors(limited, p), free.errors(p)],
        steps=12,
    )


@cache
def fitted(chip: str = "", mpt: str = "", say: Callable[[str], None] = print) -> File:
    """All stages, without a chip in any of them; what was fitted once is kept in a file.

    Args:
        chip: As `of_chip` has it; "" leaves none out.
        mpt: Which split of MPT's rows trains the layouts; "" takes all.
        say: Told of each stage.
    """
    file = _kept(f"{chip} {mpt}")
    if file.exists():
        found: File = json.loads(file.read_text(encoding="utf-8"))
        return {**found, **{name: stored()[name] for name in _ELSEWHERE}}
    before = unfitted() if not mpt else json.loads(json.dumps(fitted(chip, "", say)))
    rows = few([r for r in layouts.mpt_steps() if not of_chip(r.gpu, chip)], 24)
    if mpt:
        out = layouts.MPT_SPLITS[mpt]
        rows = few([r for r in layouts.mpt_steps() if not out(r)], 24)
        start = unfitted()
        for knob in (*OPERATOR_KNOBS, *LINK_KNOBS):
            _copy(before, start, knob)
        before = start
    links = [t.name for t in transfers.all_reduces() if not of_chip(t.gpu, chip)]
    stages: list[tuple[str, Callable[[File], File]]] = [
        ("operators", lambda d: d if mpt else fit_operators(d, chip)),
        ("transfers", lambda d: d if mpt else fit_links(d, links)),
        ("layouts", lambda d: fit_layouts(d, rows)),
        ("steps", lambda d: fit_steps(d, chip)),
        ("power", lambda d: fit_power(d, chip)),
    ]
    now = before
    for name, stage in stages:
        began = time.monotonic()
        now = stage(now)
        say(f"{name}{f', without {chip}' if chip else ''}: {time.monotonic() - began:.1f} s")
    now["fitted_capabilities"] = sorted(
        {s.gpu.compute_capability for s in _stepped() if not of_chip(s.gpu, chip)}, key=float
    )
    file.write_text(json.dumps(now), encoding="utf-8")
    return now


def _copy(source: File, target: File, knob: Knob) -> None:
    for key in knob.path[:-1]:
        source, target = source[key], target.setdefault(key, {})
    target[knob.path[-1]] = source[knob.path[-1]]


def _stepped() -> list[Any]:
    """What was measured as operators in all shapes or as whole steps."""
    return [
        *data.neusight_operators(),
        *data.vidur_operators(),
        *training_jobs.published_steps(),
        *jobs.timm_steps(),
        *jobs.torchvision_steps(),
    ]


# Parts of the file that are worked out elsewhere, and modules that they or words alone are for.
_ELSEWHERE = ("cpu", "spread")
_OTHER_MODULES = ("cpu_time.py", "intervals.py", "parameters.py", "lines.py")


def _kept(name: str) -> Path:
    """Where a fit lies; another file once the model, the jobs or the numbers set by hand change."""
    here = Path(__file__).parent
    sources = [*FILE.parent.glob("*.py"), *(here / "predictor").glob("*.py"), Path(__file__)]
    numbers = {name: value for name, value in unfitted().items() if name not in _ELSEWHERE}
    found = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for source in sorted(source for source in sources if source.name not in _OTHER_MODULES):
        found.update(source.read_bytes())
    found.update(name.encode())
    folder = Path(os.environ.get("SUANLI_CACHE") or tempfile.gettempdir()) / "predictor-fits"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{found.hexdigest()[:16]}.json"


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
    found = rounded(fitted())
    as_parameters(found)
    text = json.dumps(found, indent=2) + "\n"
    if options.check:
        print(text)
    else:
        FILE.write_text(text, encoding="utf-8")
        print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
