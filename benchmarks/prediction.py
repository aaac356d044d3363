"""How far the predictor is off on cards and configurations that it was not fitted to.

    SUANLI_DATA=... python -m benchmarks.prediction [--only NAME,...] [--out DIR]

Each line of the table leaves a card (never a row) out of the fit; sets of one card are split by
configuration or by the number of cards, with that card's constants taken from the other sets.
Beside each stands what a simpler rule gives. Writes results/prediction.json and .md.
"""

import argparse
import copy
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
from benchmarks.predictor.data import of_chip
from benchmarks.predictor.errors import Operators, Steps, layout_error
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
from suanli.cost.power_draw import carried_w
from suanli.cost.predictor import predict_operators, simplest_bound_ms, transfer

_RESULTS = Path(__file__).parent / "results"


CHIPS = ("P100", "V100", "T4", "A100", "3090", "4090")
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
    """Operators and whole models, one chip left out at a time: of A100 all."""
    for card in NEUSIGHT_CARDS:
        p = _without(chip_of(card))
        say(f"without {chip_of(card)}")
        for found in data.neusight_operators():
            if found.gpu.name != card:
                continue
            yield line(
                f"NeuSight operators: {found.name}",
                0.12,
                card,
                Operators([found]).errors(p)[0],
                _spread(found.gpu, p, operator=True),
                {"plain roofline": _roofline(found)},
                "operator",
                p.spread.operator,
            )
        steps = [s for s in jobs.neusight_steps() if s.gpu.name == card]
        others = [s for s in jobs.neusight_steps() if s.gpu.name != card]
        beside = {"ratio of specs": _from_others(steps, others), "plain roofline": _bounds(steps)}
        errors, spread = _alone(steps, p)
        whole = line(
            "NeuSight end to end", 0.10, card, errors, spread, beside, "base", p.spread.base
        )
        yield replace(whole, published=NEUSIGHT_STATED.get(card, "none at hand"))


def _without(chip: str) -> Parameters:
    """Constants of which none has seen this chip, whatever the card or the data set."""
    return as_parameters(fits.fitted(chip))


def chip_of(card: str) -> str:
    """The word of a card's name that names its chip, which all its versions share."""
    return next(word for word in CHIPS if word in card.split())


def _alone(steps: list[jobs.Step], p: Parameters) -> tuple[Any, Any]:
    """Log errors of steps predicted from their graphs, and the spread of each."""
    ready = Steps(steps)
    waits = ready.seconds(p)[1]
    spread = [
        spread_of(step.gpu, (), p, waiting=float(wait))[0]
        for step, wait in zip(steps, waits, strict=True)
    ]
    return ready.errors(p), spread


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


def _count_knobs(layout: str, p: Parameters) -> tuple[Knob, ...]:
    """What is fitted to the totals of one card's table.

    Traffic is drawn to what the usual layer has: a product writes its result and the next one
    reads it, more of it where images lie channels first; a norm and a bend between them read and
    write it once each.
    """
    product = p.layout_traffic if layout == "nchw" else 1.0
    return tuple(
        Knob(path=("counts", name), prior=prior, width=width)
        for name, prior, width in (
            ("share", 0.8, 0.3),
            ("half_intensity", 100.0, 1.5),
            ("traffic", 4.0 + 2.0 * product, 0.3),
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
    for source, target in (("3090", "4090"), ("4090", "3090")):
        p = _without(target)
        yield from _transfers(jobs.timm_steps(), "timm graphs", 0.12, source, target, p)
        trained = [s for s in jobs.timm_training_steps() if of_chip(s.gpu, target)]
        if trained:
            name = "timm training, from the graph alone"
            card = trained[0].gpu.name
            yield line(name, 0.15, card, *_alone(trained, p), {}, "base", p.spread.base)


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
    start = copy.deepcopy(fits.fitted(chip_of(b.name)))
    for card in (a, b):  # a factor of the source alone would count as a difference of the two
        start["capability"].pop(card.compute_capability, None)
    fitted = fit(
        start,
        _count_knobs(layout, as_parameters(start)),
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
    steps: Iterable[jobs.Step], name: str, target: float, source: str, chip: str, p: Parameters
) -> Iterable[Line]:
    """Steps on a chip from the same job on `source`; batches may differ, samples are compared."""
    steps = list(steps)
    here = {s.job: s for s in steps if of_chip(s.gpu, source)}
    there = [s for s in steps if of_chip(s.gpu, chip)]
    both = [s for s in there if s.job in here]
    known = [here[s.job] for s in both]
    errors = Steps(both).errors(p) - Steps(known).errors(p)
    rate = [
        math.log(_per_sample(k) * _rate(k) / _rate(s) / _per_sample(s))
        for s, k in zip(both, known, strict=True)
    ]
    spread = [spread_of(s.gpu, (), p, base=p.spread.transfer)[0] for s in both]
    case = f"{known[0].gpu.name} -> {both[0].gpu.name}"
    own = p.spread.transfer
    yield line(name, target, case, errors, spread, {"ratio of rates": rate}, own=own)
    name, card = f"{name}, from the graph alone", there[0].gpu.name
    yield line(name, target, card, *_alone(there, p), {}, "base", p.spread.base)


def _per_sample(step: jobs.Step) -> float:
    return step.seconds / step.work.batch


def _rate(step: jobs.Step) -> float:
    return peak_flops(step.gpu, step.how.dtype)


def published(say: Callable[[str], None]) -> Iterable[Line]:
    """DeepLearningExamples: V100 to A100 and back."""
    steps = one_per_kind(training_jobs.published_steps())
    for source, chip in (("V100", "A100"), ("A100", "V100")):
        say(f"DeepLearningExamples {chip}")
        p = _without(chip)
        yield from _transfers(steps, "DeepLearningExamples", 0.15, source, chip, p)


def one_per_kind(steps: Iterable[jobs.Step]) -> list[jobs.Step]:
    """Each job once per kind of chip, whatever its memory; of two figures the faster.

    What slowed the slower one is no property of the chip (tables of equal chips differ up to two
    times).
    """
    found: dict[tuple[str, str], jobs.Step] = {}
    for step in sorted(steps, key=lambda s: s.seconds / s.work.batch):
        found.setdefault((step.job, chip_of(step.gpu.name)), step)
    return list(found.values())


_HOST = Knob(path=("host_backward_s",), prior=5e-5, width=1.0)


def vtrain(say: Callable[[str], None]) -> Iterable[Line]:
    """Groups of (tp, dp, pp) left out in three folds; the host's cost is this framework's."""
    rows = layouts.vtrain_steps()
    groups = sorted({r.group for r in rows})
    start = fits.fitted()
    errors, flat = [], []
    for fold in range(3):
        out = set(groups[fold::3])
        train = fits.few([r for r in rows if r.group not in out], 60)
        p = as_parameters(fits.fit_layouts(start, train, (_HOST,)))
        test = fits.few([r for r in rows if r.group in out], 160, seed=1)
        errors += [layout_error(r, p) for r in test]
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
    for case, out in layouts.MPT_SPLITS.items():
        p = as_parameters(fits.fitted(mpt=case))
        test = [r for r in rows if out(r)]
        mfu = statistics.median(_mfu(r) for r in rows if not out(r))
        errors = [layout_error(r, p) for r in test]
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
        names = [t.name for t in tables if t.name != out.name]
        p = as_parameters(fits.fit_links(fits.unfitted(), names))
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
        p = _without(chip_of(card))
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
    """Time and power by batch: carried over from the other card, and from the graph alone."""
    rows = zeus.free_rows()
    for card in sorted({r.gpu.name for r in rows}):
        p = _without(chip_of(card))
        mine = [r for r in rows if r.gpu.name == card]
        other = {r.job: r for r in rows if r.gpu.name != card}
        yield from _zeus_transfers([(r, other[r.job]) for r in mine if r.job in other], p)
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
        for what, errors, judged, beside in (
            ("power", watts, answers, {"the limit": limit}),
            ("time", times, [a for _, a in timed], {"roofline": bound}),
        ):
            spread = [a.spread for a in judged]
            own = p.spread.base
            yield line(name.format(what), 0.15, card, errors, spread, beside, "base", own)


def _zeus_transfers(
    pairs: list[tuple[zeus.FreeRow, zeus.FreeRow]], p: Parameters
) -> Iterable[Line]:
    """What `transfer` makes of an epoch and its power on the other card, at the same batch."""
    times, watts, spread, rate, same = [], [], [], [], []
    for there, here in pairs:
        cards = here.gpu, there.gpu
        answer = transfer(there.work, 1e3 * here.epoch_s, *cards, dtype="fp32", constants=p)
        here_w, there_w = (
            predict_operators(there.work, card, dtype="fp32", constants=p).power_w or 1.0
            for card in cards
        )
        carried = carried_w(
            there.gpu, p.clock, measured_w=here.power_w, here_w=here_w, there_w=there_w
        )
        times.append(math.log(answer.step_ms.p50 * 1e-3 / there.epoch_s))
        watts.append(math.log(carried / there.power_w))
        spread.append(answer.spread)
        ratio = peak_flops(here.gpu, "fp32") / peak_flops(there.gpu, "fp32")
        rate.append(math.log(ratio * here.epoch_s / there.epoch_s))
        same.append(math.log(here.power_w / there.power_w))
    case = f"{pairs[0][1].gpu.name} -> {pairs[0][0].gpu.name}"
    name = "Zeus {} by batch, from the other card"
    own = p.spread.transfer
    yield line(name.format("time"), 0.15, case, times, spread, {"ratio of rates": rate}, own=own)
    yield line(name.format("power"), 0.15, case, watts, spread, {"the same power": same}, own=own)


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
