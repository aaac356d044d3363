"""`suanli predict` as text."""

from rich.console import Console
from rich.text import Text

from suanli.base import units
from suanli.base.memory import MemoryUse
from suanli.base.predict_results import (
    CatalogueResult,
    ChooseResult,
    Here,
    PredictResult,
    Ranked,
)
from suanli.base.prediction import Interval, ParallelLayout
from suanli.reports.layout import Line, console, lines, table

_MOST_RANKED = 20  # lines; --json has the rest
_MOST_NAMES = 6
_LEAST_PART = 1e-4  # of a step: what takes less is not told


def predict(result: PredictResult, out: Console | None = None) -> None:
    """Print one prediction."""
    out = out or console()
    cards = f"{result.n_devices} x " if result.n_devices > 1 else ""
    kind = "training" if result.mode == "train" else "inference"
    out.print(
        Text.assemble(
            (result.workload, "bold"),
            f", {kind}, batch {result.batch}, {result.plan.title}, on {cards}{result.device.title}",
        )
    )
    out.print(lines(_findings(result), out.width))
    notes: list[Line] = [("wider", words) for words in result.widened]
    notes += [("note", words) for words in result.notes]
    notes.append(("sources", _sources(result.sources)))
    out.print(lines(notes, out.width, style="dim"))


def _findings(result: PredictResult) -> list[Line]:
    found: list[Line] = [
        ("step", f"{_interval(result.step_ms)}, {units.rate(result.samples_per_s)} samples/s")
    ]
    if result.n_devices > 1:
        found.append(("layout", _layout(result.layout)))
    parts = {
        "compute": result.compute_ms,
        "memory": result.memory_ms,
        "overhead": result.overhead_ms,
        "communication": result.communication_ms,
    }
    least_ms = _LEAST_PART * result.step_ms.p50
    told = [f"{name} {units.milliseconds(ms)}" for name, ms in parts.items() if ms > least_ms]
    found.append(("bound by", f"{result.bound_by}; {', '.join(told)}"))
    found.append(
        (
            "limit",
            f"{units.milliseconds(result.sol.ms)}: this is "
            f"{units.share(result.sol.fraction)} of the speed of light; work over "
            f"(devices x printed rate) is {units.milliseconds(result.sol.simplest_ms)}",
        )
    )
    need, have = units.size(result.memory.total_bytes), units.size(result.usable_bytes)
    fits = Text("fits", "green") if result.fits else Text("does not fit", "red bold")
    found.append(("memory", Text.assemble(fits, f": {need} of {have} on each device")))
    found.append(("", _memory(result.memory)))
    if result.energy_j is not None and result.power_w is not None:
        each = f"{result.energy_j:.3g} J a step, {result.power_w:.0f} W a card"
        found.append(("energy", each))
    if result.cost is not None:
        cost = result.cost
        money = f"{cost.per_million_samples:.3g} {cost.currency}".rstrip()
        found.append(
            (
                "cost",
                f"{money} for a million samples, {cost.per_hour:.2f} an hour",
            )
        )
    return found


def _interval(step: Interval) -> str:
    low, high = units.milliseconds(step.lo90), units.milliseconds(step.hi90)
    return f"{units.milliseconds(step.p50)} ({low} to {high}, 90 %)"


def _layout(layout: ParallelLayout) -> str:
    words = [f"dp {layout.dp}", f"tp {layout.tp}", f"pp {layout.pp}"]
    if layout.micro_batches > 1:
        words.append(f"{layout.micro_batches} micro-batches")
    words += ["sharded replicas"] if layout.sharded else []
    words += ["recomputed activations"] if layout.recompute else []
    return ", ".join(words)


def _memory(memory: MemoryUse) -> str:
    kinds = {
        "weights": memory.weights_bytes,
        "gradients": memory.gradients_bytes,
        "optimiser": memory.optimizer_bytes,
        "activations": memory.activations_bytes,
        "workspace": memory.workspace_bytes,
        "KV cache": memory.kv_cache_bytes,
        "fragmentation": memory.fragmentation_bytes,
        "context": memory.context_bytes,
    }
    return ", ".join(f"{name} {units.size(size)}" for name, size in kinds.items() if size)


def _sources(sources: tuple[str, ...]) -> str:
    return "; ".join(dict.fromkeys(sources))


def choose(result: ChooseResult, out: Console | None = None) -> None:
    """Print a ranking."""
    out = out or console()
    cards = f"{result.n_devices} of each, " if result.n_devices > 1 else ""
    kind = "training" if result.mode == "train" else "inference"
    out.print(
        Text.assemble(
            (result.workload, "bold"),
            f", {kind}, {cards}batch {result.batch}, {result.samples:,} samples",
        )
    )
    _print_ranked(out, result)
    told: list[Line] = []
    groups: dict[str, list[str]] = {}
    for entry in result.excluded:
        groups.setdefault(entry.reason.partition(":")[0], []).append(entry.gpu)
    for reason, names in groups.items():
        shown = ", ".join(names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        told.append(("out" if not told else "", f"{reason}: {shown}{more}"))
    if result.here is not None:
        told.append(("here", _here(result.here)))
    told += [("note", words) for words in result.notes]
    if any(entry.pareto for entry in result.ranked):
        told.append(("*", "no other card beats it in time, money and energy together"))
    out.print(lines(told, out.width, style="dim"))


def _print_ranked(out: Console, result: ChooseResult) -> None:
    if not result.ranked:
        out.print(Text("  no card is left", "red bold"))
        return
    priced = any(entry.job_cost is not None for entry in result.ranked)
    grid = table(out.width)
    grid.add_column("", no_wrap=True)
    grid.add_column("card", ratio=1, overflow="fold")
    for heading in ("step", "90 %", "samples/s", *(["cost"] if priced else []), "kWh", "memory"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for entry in result.ranked[:_MOST_RANKED]:
        grid.add_row(*_row(entry, priced), style="bold" if entry.pareto else "")
    out.print(grid)
    if len(result.ranked) > _MOST_RANKED:
        out.print(Text(f"  and {len(result.ranked) - _MOST_RANKED} more: --json has them", "dim"))


def _row(entry: Ranked, priced: bool) -> list[str]:
    spread = entry.step_ms.hi90 / entry.step_ms.p50 - 1.0
    energy = entry.job_energy_j
    cost = "" if entry.job_cost is None else f"{entry.job_cost:.3g}"
    return [
        "*" if entry.pareto else "",
        entry.gpu,
        units.milliseconds(entry.step_ms.p50),
        f"+{spread * 100:.0f} %",
        units.rate(entry.samples_per_s),
        *([cost] if priced else []),
        "" if energy is None else f"{energy / 3.6e6:.3g}",
        units.share(entry.memory.total_bytes / entry.usable_bytes),
    ]


def _here(here: Here) -> str:
    words = f"{here.device.title}, batch {here.batch}: {_interval(here.predicted_ms)} predicted"
    if here.measured_ms is not None:
        words += f", {units.milliseconds(here.measured_ms)} measured"
    return f"{words}, {units.rate(here.samples_per_s)} samples/s"


def gpus(result: CatalogueResult, out: Console | None = None) -> None:
    """Print the catalogue."""
    out = out or console()
    grid = table(out.width)
    grid.add_column("card", ratio=1, overflow="fold")
    for heading in ("memory", "GB/s", "fp32", "fp16", "fp8", "W"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for name, sheet in result.gpus.items():
        rates = [sheet.dense_tflops.get(dtype) for dtype in ("fp32", "fp16", "fp8")]
        figures = [sheet.memory_gb, sheet.memory_gb_per_s, *rates, sheet.power_w]
        grid.add_row(name, *("" if f is None else f"{f:g}" for f in figures))
    out.print(grid)
    told = "GB; dense TFLOP/s. Empty: no source was found. --json has every figure's source."
    out.print(lines([("", told)], out.width, style="dim"))
