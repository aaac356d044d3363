"""The result of `suanli train` as text."""

import shlex

from rich.console import Console
from rich.text import Text

from suanli.base import units
from suanli.base.train_results import TrainQuality, TrainResult
from suanli.reports.layout import Line
from suanli.reports.layout import console as _console
from suanli.reports.layout import lines as _lines
from suanli.reports.text import _limit, _skipped, _tally, _trials, ratio

_STOPPED = {
    "epochs": "all epochs are done",
    "steps": "the steps asked for are done",
    "target": "the target was reached",
    "time": "the time was over",
    "asked": "stopped early",
}


def train(
    result: TrainResult, console: Console | None = None, *, asked: tuple[str, ...] = ()
) -> None:
    """Print what was tried, how the run went, and where it is.

    Args:
        result: Of the run.
        console: Where to; standard output by default.
        asked: The workload as it was typed, and the options that a run that goes on needs as well.
    """
    out = console or _console()
    if result.trials:
        out.print(_trials(result.trials, result.plan.as_plan(), out.width))
        skipped = [trial for trial in result.trials if trial.status == "skipped"]
        if skipped:
            out.print()
            out.print(_lines(_skipped(skipped), out.width))
        out.print()
    title = f", batch {result.batch}, seed {result.seed}, on {result.device.title}"
    out.print(Text.assemble((result.workload, "bold"), title))
    out.print(_lines(_findings(result), out.width))
    out.print()
    if result.interrupted:
        name, *more = asked or (result.workload,)
        again = ("suanli", "train", name, "--resume", "-o", result.run_dir, *more)
        out.print(Text(f"Go on with: {shlex.join(again)}"), soft_wrap=True)
    elif result.weights:
        out.print(Text.assemble("The weights are in ", (result.weights, "bold")), soft_wrap=True)


def _findings(result: TrainResult) -> list[Line]:
    plan = result.plan
    found: list[Line] = [("plan", Text.assemble((plan.title, "bold"), f"  ({plan.key})"))]
    if result.step_ms is not None:
        step = units.milliseconds(result.step_ms.p50)
        found.append(("step", f"{step}, {units.rate(result.samples_per_s)} samples/s"))
    if result.speedup is not None:
        over = f" over the best baseline, {result.baseline}"
        found.append(("speed-up", Text.assemble((ratio(result.speedup), "bold"), over)))
    found += _limit(result.sol)
    if result.mfu is not None:
        found.append(("", f"{units.share(result.mfu)} of the peak goes into matrix products"))
    found.append(("loss", f"{result.loss:.4g} (mean of the last epoch)"))
    if result.quality is not None:
        found += _quality(result.quality)
    resumed = f", resumed from step {result.resumed_from}" if result.resumed_from else ""
    found.append(
        (
            "run",
            f"{result.epochs:.2f} epochs, {result.steps} steps in {result.train_seconds:.1f} s"
            f"{resumed}: {_STOPPED[result.stopped]}",
        )
    )
    if not result.as_written:
        found.append(("", "hyper-parameters are not the workload's as written: see run.json"))
    found += [("note", Text(note, "yellow")) for note in result.notes]
    found.append(("folder", result.run_dir))
    if result.trials:
        found.append(("search", _tally(result)))
    return found


def _quality(quality: TrainQuality) -> list[Line]:
    def shown(value: float) -> str:
        return f"{value:.4g}" if quality.metric == "loss" else units.percent(value)

    name = quality.metric.replace("_", " ")
    words = Text.assemble(
        f"{name} ", (shown(quality.value), "bold"), f" on {quality.n} unseen samples"
    )
    if quality.target is not None:
        words.append(f", target {shown(quality.target)}")
        if quality.reached_at_s is not None:
            words.append(f" reached after {quality.reached_at_s:.1f} s of training")
        else:
            words.append(" not reached", "yellow")
    return [("quality", words)]
