"""The command `suanli profile`: arguments to `suanli.api_profile`, nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from suanli.base.processes import rank
from suanli.cli_output import Json, Report, check_report, examples, print_result

_WHAT = typer.Argument(
    metavar="WORKLOAD|ENGINE|RUN",
    help="A built-in name, file.py:name, model.onnx, model.keras, hf:CONFIG, or the folder of an "
    "engine or of a training run.",
    show_default=False,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "suanli profile resnet50 --batch 8 --check 3",
            "suanli profile cifar10-fast --train --trace step.json",
            "suanli profile my-engine",
        )
    )(profile)


def profile(  # noqa: PLR0913, PLR0917
    what: Annotated[str, _WHAT],
    train: Annotated[
        bool | None,
        typer.Option("--train/--infer", help="A training step, or inference.", show_default=False),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Samples in a step.", show_default=False)
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A plan; else the usual one.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps to time.")] = 30,
    check: Annotated[int, typer.Option(metavar="N", help="Try the first N pieces of advice.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda:0 and so on, or auto.")
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a timeline for Perfetto or Chrome.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Data of the workload.", show_default=False),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code of an engine made by somebody else.")
    ] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Say where a step's time goes, and what to change.

    Operators with their work and their limits, what lies between them, memory by kind, spread over
    steps; then a ranked list of changes, each with the gain to expect. --check tries them.
    """
    from suanli.api_profile import profile as run
    from suanli.reports import profile_text, text

    check_report(report)
    first = rank() == 0  # of torchrun's processes one speaks
    with text.Live(quiet=as_json or not first) as live:
        result = run(
            what,
            train=train,
            batch=batch,
            plan=plan,
            steps=steps,
            check=check,
            device=device,
            trace=trace,
            data=data,
            trust=trust,
            on_event=live.event,
        )
    if first:
        print_result(result, as_json, profile_text.profile, report)
