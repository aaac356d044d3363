"""How far the predictor is off on cards and configurations that it was not fitted to.

    SUANLI_DATA=... python -m benchmarks.prediction [--only NAME,...] [--out DIR]

Each line of the table leaves a card (never a row) out of the fit; sets of one card are split by
configuration or by the number of cards, with that card's constants taken from the other sets.
Beside each stands what a simpler rule gives. Writes results/prediction.json and .md.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fit_predictor as fits
from benchmarks.predictor import data, jobs, layouts, training_jobs, transfers, zeus
from benchmarks.predictor.fitting import Knob, as_parameters, fit, stored
from benchmarks.predictor.lines import (
    Line,
    calibrated,
    judged_anew,
    line,
    markdown,
    summary,
)
from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.counts import Counts, step_of_counts_s
from suanli.cost.gpu_rates import peak_flops
from suanli.cost.intervals import spread_of
from suanli.cost.parameters import Parameters
from suanli.cost.predictor import predict_operators, simplest_bound_ms

_RESULTS = Path(__file__).parent / "results"


NEUSIGHT_CARDS = (
    "Tesla P100 PCIe 16GB",
    "Tesla V100 PCIe 32GB",
    "Tesla T4",
    "A100 PCIe 40GB",
    "A100 PCIe 80GB",
)

# Ranges over models, in fp32, that NeuSight's authors state for their predictor (Lee et al.,
# "Forecasting GPU performance for deep learning training and inference", ASPLOS 2025).
NEUSIGHT_STATED = {"Tesla T4": "4-35 %"}


def neusight(say: Callable[[str], None]) -> Iterable[Line]:
    """Operators and whole models, one card left out at a time; both A100 count as one kind too."""
    for card in NEUSIGHT_CARDS:
        p = as_parameters(fits.fit_operators(stored_without(card), without=(card,)))
        say(f"without {card}")
        for found in data.neusight_operators():
            if found.gpu.name != card:
                continue
            errors = fits.operator_errors(found, p)
            yield line(
                f"NeuSight operators: {found.name}",
                0.12,
                card,
                errors,
                _spread(found.gpu, p, operator=True),
                {"plain roofline": _roofline(found)},
                "operator",
            )
        steps = [s for s in jobs.neusight_steps() if s.gpu.name == card]
        errors = [fits.step_error(s, p) for s in steps]
        others = [s for s in jobs.neusight_steps() if s.gpu.name != card]
        whole = line(
            "NeuSight end to end",
            0.10,
            card,
            errors,
            _spread(steps[0].gpu, p),
            {"ratio of specs": _from_others(steps, others), "plain roofline": _bounds(steps)},
            "base",
        )
        yield replace(whole, published=NEUSIGHT_STATED.get(card, "none at hand"))


def stored_without(*cards: str) -> dict[str, Any]:
    """The parameter file with what only these cards can have taught taken out.

    Factors of a generation go when all its cards go; priors then stand in for them.
    """
    start = stored()
    left = {s.gpu.compute_capability for s in _all_fitted() if s.gpu.name not in cards}
    gone = {data.sheets()[card].compute_capability for card in cards} - left
    for capability in gone:
        start["capability"].pop(capability, None)
        watts = start["clock"]["w_per_vector_tflop"]
        watts[capability] = {"6.0": 16.0, "7.0": 14.0, "7.5": 14.0, "8.0": 11.7}.get(
            capability, watts.get(capability, 10.0)
        )
    return start


def _all_fitted() -> list[Any]:
    return [*data.neusight_operators(), *data.vidur_operators(), *data.matmul_ceilings()]


def _spread(gpu: GpuSheet, p: Parameters, *, operator: bool = False) -> float:
    base = p.spread.operator if operator else p.spread.base
    return spread_of(gpu, (), p, base=base)[0]


def _roofline(found: data.OperatorSet) -> Any:
    """Printed rate or printed bandwidth, whichever is slower."""
    k = found.kernels
    flops = 2 * k["batch"] * k["m"] * k["n"] * k["k"]
    compute_s = flops / peak_flops(found.gpu, found.dtype)
    return np.log(np.maximum(compute_s, k["moved"] / found.gpu.memory_bytes_per_s) / found.seconds)


def _bounds(steps: list[jobs.Step]) -> list[float]:
    """The articles' formula: all products at the printed rate."""
    return [
        math.log(simplest_bound_ms(s.work, s.gpu, dtype=s.how.dtype) * 1e-3 / s.seconds)
        for s in steps
    ]


def _from_others(steps: list[jobs.Step], others: list[jobs.Step]) -> list[float]:
    """The same job measured on the first other card, times the ratio of printed rates."""
    found = []
    for step in steps:
        same = [o for o in others if o.job == step.job]
        if same:
            o = same[0]
            ratio = peak_flops(o.gpu, o.how.dtype) / peak_flops(step.gpu, step.how.dtype)
            found.append(math.log(o.seconds * ratio / step.seconds))
    return found or [float("nan")]


COUNT_KNOBS = tuple(
    Knob(path=("counts", name), prior=prior, width=width)
    for name, prior, width in (
        ("share", 0.8, 0.3),
        ("half_intensity", 100.0, 1.5),
        ("traffic", 4.0, 0.7),
        ("starts", 4.0, 1.0),
        ("overlap", 2.0, 0.7),
    )
)


def timm(say: Callable[[str], None]) -> Iterable[Line]:
    """One card's table and the other's sheet give the other's table."""
    for layout in ("nchw", "nhwc"):
        tables = {
            card: {
                (row["model"], row["infer_img_size"], row["infer_batch_size"]): row
                for row in data.rows(f"timm_benchmark-infer-amp-{layout}-pt240-cu124-{card}.csv")
                if row["infer_step_time"] and float(row["infer_gmacs"] or 0) > 0
            }
            for card in ("rtx3090", "rtx4090")
        }
        for source, target in (("rtx3090", "rtx4090"), ("rtx4090", "rtx3090")):
            yield _timm_table(layout, source, target, tables)
            say(f"timm {layout} {source}")
    for source, target in (("rtx3090", "rtx4090"), ("rtx4090", "rtx3090")):
        card = data.gpu(target).name
        p = as_parameters(fits.fit_steps(stored(), without=(card,)))
        yield from _transfers(
            jobs.timm_steps(), "timm graphs", 0.12, data.gpu(source).name, card, p
        )
        trained = [s for s in jobs.timm_training_steps() if s.gpu.name == card]
        if trained:
            errors = [fits.step_error(s, p) for s in trained]
            name = "timm training, from the graph alone"
            yield line(name, 0.15, card, errors, _spread(trained[0].gpu, p), {}, "base")


def _timm_table(layout: str, source: str, target: str, tables: dict[str, Any]) -> Line:
    keys = sorted(tables[source].keys() & tables[target].keys())
    here, there = (
        np.array([float(tables[card][key]["infer_step_time"]) * 1e-3 for key in keys])
        for card in (source, target)
    )
    macs, acts, size, batch = (
        np.array([float(tables[source][key][c]) for key in keys])
        for c in ("infer_gmacs", "infer_macts", "param_count", "infer_batch_size")
    )
    counts = Counts(macs=macs * 1e9, activations=acts * 1e6, parameters=size * 1e6, batch=batch)
    a, b = data.gpu(source), data.gpu(target)
    start = stored()
    for card in (a, b):  # a factor of the source alone would count as a difference of the two
        start["capability"].pop(card.compute_capability, None)
    fitted = fit(
        start,
        COUNT_KNOBS,
        lambda p: [np.log(step_of_counts_s(counts, a, p, dtype="fp16") / here)],
        steps=10,
    )
    p = as_parameters(fitted)
    on_a = step_of_counts_s(counts, a, p, dtype="fp16")
    on_b = step_of_counts_s(counts, b, p, dtype="fp16")
    rate = peak_flops(a, "fp16") / peak_flops(b, "fp16")
    width = (a.memory_gb_per_s or 1.0) / (b.memory_gb_per_s or 1.0)
    return line(
        f"timm by totals, {layout}",
        0.12,
        f"{a.name} -> {b.name}",
        np.log(here * on_b / on_a / there),
        p.spread.transfer,
        {
            "ratio of rates": np.log(here * rate / there),
            "ratio of bandwidths": np.log(here * width / there),
        },
    )


def _transfers(
    steps: Iterable[jobs.Step], name: str, target: float, source: str, card: str, p: Parameters
) -> Iterable[Line]:
    """Steps on `card` from the same job on `source`; batches may differ, samples are compared."""
    steps = list(steps)
    here = {s.job: s for s in steps if chip_of(s) == source}
    errors, rate, absolute = [], [], []
    for there in (s for s in steps if chip_of(s) == card):
        known = here.get(there.job)
        absolute.append(fits.step_error(there, p))
        if known is None:
            continue
        errors.append(fits.step_error(there, p) - fits.step_error(known, p))
        per_sample = known.seconds / known.work.batch * there.work.batch
        ratio = peak_flops(known.gpu, known.how.dtype) / peak_flops(there.gpu, there.how.dtype)
        rate.append(math.log(per_sample * ratio / there.seconds))
    if errors:
        case = f"{source} -> {card}"
        yield line(name, target, case, errors, p.spread.transfer, {"ratio of rates": rate})
    alone = f"{name}, from the graph alone"
    yield line(alone, target, card, absolute, _spread(data.sheets()[card], p), {}, "base")


def published(say: Callable[[str], None]) -> Iterable[Line]:
    """DeepLearningExamples: V100 to A100 and back; all cards of the other kind left out."""
    kinds = {
        "A100 SXM4 80GB": ("A100 SXM4 40GB", "A100 SXM4 80GB", "A100 PCIe 40GB", "A100 PCIe 80GB"),
        "Tesla V100 SXM2 32GB": ("Tesla V100 SXM2 16GB", "Tesla V100 SXM2 32GB"),
    }
    steps = one_per_kind(training_jobs.published_steps())
    for source, card in (
        ("Tesla V100 SXM2 32GB", "A100 SXM4 80GB"),
        ("A100 SXM4 80GB", "Tesla V100 SXM2 32GB"),
    ):
        p = as_parameters(fits.fit_steps(stored_without(*kinds[card]), without=kinds[card]))
        say(f"DeepLearningExamples {card}")
        yield from _transfers(steps, "DeepLearningExamples", 0.15, source, card, p)


# Cards that differ in memory alone stand for one chip; each is predicted by its own sheet.
_CHIPS = {"Tesla V100 SXM2 16GB": "Tesla V100 SXM2 32GB", "A100 SXM4 40GB": "A100 SXM4 80GB"}


def chip_of(step: jobs.Step) -> str:
    """The card whose chip ran the step."""
    return _CHIPS.get(step.gpu.name, step.gpu.name)


def one_per_kind(steps: Iterable[jobs.Step]) -> list[jobs.Step]:
    """Each job once per kind of chip, whatever its memory; of two figures the faster.

    What slowed the slower one is no property of the chip (tables of equal chips differ up to two
    times).
    """
    found: dict[tuple[str, str], jobs.Step] = {}
    for step in sorted(steps, key=lambda s: s.seconds / s.work.batch):
        found.setdefault((step.job, chip_of(step)), step)
    return list(found.values())


_HOST = Knob(path=("host_backward_s",), prior=5e-5, width=1.0)


def vtrain(say: Callable[[str], None]) -> Iterable[Line]:
    """Groups of (tp, dp, pp) left out in three folds; the host's cost is this framework's."""
    rows = layouts.vtrain_steps()
    groups = sorted({r.group for r in rows})
    start = stored()
    start["host_backward_s"] = 5e-5
    errors, flat = [], []
    for fold in range(3):
        out = set(groups[fold::3])
        train = fits.few([r for r in rows if r.group not in out], 90)
        p = as_parameters(fits.fit_layouts(start, train, (_HOST,)))
        test = fits.few([r for r in rows if r.group in out], 160, seed=1)
        errors += [fits.layout_error(r, p) for r in test]
        mfu = statistics.median(_mfu(r) for r in train)
        flat += [math.log(_mfu(r) / mfu) for r in test]
        say(f"vTrain fold {fold + 1} of 3")
    found = line(
        "vTrain, one server of A100",
        0.10,
        "groups of (tp, dp, pp), three folds",
        errors,
        _layout_spread(p, 8),
        {"constant MFU": flat},
        "doubling",
    )
    yield replace(found, published="8.4 % (mean)")


def _mfu(row: layouts.Spread) -> float:
    return row.flops / row.seconds / row.layout.devices / peak_flops(row.gpu, row.dtype)


def _layout_spread(p: Parameters, devices: float) -> float:
    return math.hypot(p.spread.base, p.spread.doubling * math.log2(devices))


def mpt(say: Callable[[str], None]) -> Iterable[Line]:
    """Eight cards teach 16 to 128 and back; one memory size teaches the other."""
    rows = layouts.mpt_steps()
    splits: dict[str, Callable[[layouts.Spread], bool]] = {
        "16-128 cards, from 8": lambda r: r.layout.devices > 8,
        "8 cards, from 16-128": lambda r: r.layout.devices == 8,
        "A100 40GB, from 80GB": lambda r: "40GB" in r.gpu.name,
        "A100 80GB, from 40GB": lambda r: "80GB" in r.gpu.name,
    }
    for case, out in splits.items():
        train = fits.few([r for r in rows if not out(r)], 70)
        test = [r for r in rows if out(r)]
        p = as_parameters(fits.fit_layouts(stored(), train))
        mfu = statistics.median(_mfu(r) for r in train)
        errors = [fits.layout_error(r, p) for r in test]
        spread = [_layout_spread(p, r.layout.devices) for r in test]
        flat = [math.log(_mfu(r) / mfu) for r in test]
        say(f"MPT {case}")
        yield line(
            "MPT, FSDP on A100", 0.12, case, errors, spread, {"constant MFU": flat}, "doubling"
        )


def nccl(say: Callable[[str], None]) -> Iterable[Line]:
    """One table left out at a time; for the V100 that leaves no mesh of NVLinks in the fit."""
    tables = transfers.all_reduces()
    for out in tables:
        start = stored()
        if "V100" in out.name:
            start["links"]["share"]["nvlink_mesh"] = 0.8
        p = as_parameters(fits.fit_links(start, [t.name for t in tables if t.name != out.name]))
        say(f"all-reduce {out.name}")
        yield line(
            "NCCL all-reduce",
            0.10,
            out.name,
            np.log(transfers.predicted(out, p) / out.seconds),
            p.spread.collective,
            {"textbook alpha-beta": np.log(transfers.textbook(out) / out.seconds)},
            "collective",
        )


def power(say: Callable[[str], None]) -> Iterable[Line]:
    """What a power limit does to time and power, from the other card's jobs."""
    rows = zeus.power_rows()
    for card in sorted({r.gpu.name for r in rows}):
        p = as_parameters(fits.fit_power(stored(), {r.gpu.name for r in rows} - {card}))
        test = [r for r in rows if r.gpu.name == card]
        times, watts = zeus.power_errors(test, p)
        say(f"Zeus {card}")
        limit = [math.log(r.limit_w / r.power_w) for r in test]
        linear = [
            math.log(r.free_seconds * max(r.limit_w, own_limit(test)) / r.limit_w / r.seconds)
            for r in test
        ]
        for what, errors, beside in (
            ("time", times, {"time by power": linear}),
            ("power", watts, {"the limit": limit}),
            ("energy", times + watts, {"limit x time": limit}),
        ):
            yield line(f"Zeus {what}", 0.15, card, errors, p.spread.power, beside, "power")


def power_by_graph(say: Callable[[str], None]) -> Iterable[Line]:
    """Power and time by batch from the graph alone, the card left out of the operators' fit."""
    rows = zeus.free_rows()
    for card in sorted({r.gpu.name for r in rows}):
        start = fits.fit_operators(stored_without(card), without=(card,))
        p = as_parameters(fits.fit_steps(start, without=(card,)))
        mine = [r for r in rows if r.gpu.name == card]
        answers = [predict_operators(r.work, r.gpu, dtype="fp32", constants=p) for r in mine]
        pairs = list(zip(mine, answers, strict=True))
        watts = [math.log((a.power_w or 1.0) / r.power_w) for r, a in pairs]
        limit = [math.log((r.gpu.power_w or 1.0) / r.power_w) for r in mine]
        timed = [(r, a) for r, a in pairs if r.seconds]
        times = [math.log(a.step_ms.p50 * 1e-3 / (r.seconds or 1.0)) for r, a in timed]
        bound = [
            math.log(simplest_bound_ms(r.work, r.gpu, dtype="fp32") * 1e-3 / (r.seconds or 1.0))
            for r, _ in timed
        ]
        say(f"Zeus graphs {card}")
        name = "Zeus {} by batch, from the graph alone"
        yield line(
            name.format("power"), 0.15, card, watts, p.spread.base, {"the limit": limit}, "base"
        )
        yield line(
            name.format("time"), 0.15, card, times, p.spread.base, {"roofline": bound}, "base"
        )


def own_limit(rows: list[zeus.PowerRow]) -> float:
    """The card's own limit."""
    return max(r.gpu.power_w or r.limit_w for r in rows)


SETS: dict[str, Callable[[Callable[[str], None]], Iterable[Line]]] = {
    "neusight": neusight,
    "timm": timm,
    "published": published,
    "vtrain": vtrain,
    "mpt": mpt,
    "nccl": nccl,
    "zeus": power,
    "zeus-graphs": power_by_graph,
}


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help=f"some of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--calibrate", action="store_true", help="write the spreads found")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name] or list(SETS)
    file = options.out / "prediction.json"
    before: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    sets: dict[str, Any] = before.get("sets", {})
    for name in chosen:
        began = time.monotonic()
        sets[name] = [asdict(x) for x in SETS[name](lambda text: print(f"  {text}", flush=True))]
        print(markdown([Line(**x) for x in sets[name]]))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        _write(options.out, sets)
    if options.calibrate:
        parameters = stored()
        lines = [Line(**x) for rows in sets.values() for x in rows]
        spreads = calibrated(lines, parameters["spread"])
        for name, rows in sets.items():
            judged = [judged_anew(Line(**x), parameters["spread"], spreads) for x in rows]
            sets[name] = [asdict(x) for x in judged]
        parameters["spread"] = spreads
        fits.FILE.write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")
        _write(options.out, sets)


def _write(folder: Path, sets: dict[str, Any]) -> None:
    """The table so far, so that what was worked out is kept whatever comes."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {name: sets[name] for name in SETS if name in sets}
    text = json.dumps({"schema": "suanli.prediction-errors/1", "sets": sets}, indent=1)
    (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
    lines = [Line(**x) for rows in sets.values() for x in rows]
    text = summary(lines) + "\n" + markdown(lines)
    (folder / "prediction.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
