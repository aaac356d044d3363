"""Arguments to verbs. No logic here: every command calls `suanli.api` and prints what came back."""

import io
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from suanli import (
    __version__,
    cli_engines,
    cli_kernel,
    cli_predict,
    cli_profile,
    cli_queue,
    cli_report,
)
from suanli.base.errors import EXIT_BAD_INPUT, EXIT_FAILED, SuanliError
from suanli.base.processes import rank
from suanli.cli_output import EXIT_STOPPED as _EXIT_STOPPED
from suanli.cli_output import WORKLOAD as _WORKLOAD
from suanli.cli_output import Budget, Json, Report, check_report
from suanli.cli_output import examples as _examples
from suanli.cli_output import print_result as _print
from suanli.cli_output import write_json as _write_json

app = typer.Typer(
    name="suanli",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds the fastest verified way to run a model on this machine, and proves that the "
    "answer stayed right.",
)

# typer brings its own copy of click since 0.26, so the base of its errors has no fixed home
_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda:0 and so on, or auto.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"suanli {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=_examples(
        "suanli doctor", "suanli optimize resnet50", "suanli optimize my.py:model -o my-engine"
    ),
)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Root options."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=_examples("suanli doctor", "suanli doctor --refresh --json"))
def doctor(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure the ceilings anew (up to 25 s).")
    ] = False,
    device: Device = "auto",
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Say what is here, and what this machine can do at most.

    Hardware, libraries, backends with the command that installs a missing one, problems with their
    mend, and the ceilings: measured on the first call and kept.
    """
    from suanli import api
    from suanli.reports import text

    check_report(report)
    with text.Live(quiet=as_json) as live:
        result = api.doctor(device=device, refresh=refresh, on_event=live.event)
    _print(result, as_json, text.doctor, report)


@app.command(
    epilog=_examples(
        "suanli optimize resnet50",
        "suanli optimize my.py:model --for throughput --batch 32 -o my-engine",
        "suanli optimize model.onnx --max-drop 1 --data pictures --budget 600",
    )
)
def optimize(  # noqa: PLR0913, PLR0917
    workload: Annotated[str, _WORKLOAD],
    objective: Annotated[
        str,
        typer.Option("--for", metavar="WHAT", help="latency (batch 1) or throughput (batch 32)."),
    ] = "latency",
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Samples in a step.", show_default=False)
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Largest batch the engine takes.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="Largest drop of quality in percentage points.")
    ] = 0.5,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            help="Accept quantised plans without labels up to this relative error.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="TYPE", help="Lowest float precision of a plan: fp32, tf32, fp16 or bf16."
        ),
    ] = "bf16",
    keep: Annotated[
        bool, typer.Option("--keep", help="Write an engine even if a baseline beats it.")
    ] = False,
    budget: Budget = 120.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Folder for the engine.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the workload's data.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="safetensors file for the model.", show_default=False),
    ] = None,
    input_shape: Annotated[
        str,
        typer.Option(
            metavar="SHAPES",
            help="Shape of one sample of each input, such as 3x224x224,128.",
            show_default=False,
        ),
    ] = "",
    input_dtype: Annotated[
        str,
        typer.Option(metavar="TYPE", help="Type of the inputs, such as int64.", show_default=False),
    ] = "",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Try only this backend; repeat for more.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier trials.")] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Find the fastest verified engine for inference.

    Tries plans within the budget, each in a process of its own, holds their answers to the model's
    own, and races the fastest one that is right against what PyTorch does without it.
    """
    from suanli import api
    from suanli.reports import text

    check_report(report)
    with text.Live(quiet=as_json) as live:
        result = api.optimize_workload(
            workload,
            api.OptimizeOptions(
                objective=cast(Any, objective),
                batch=batch,
                max_batch=max_batch,
                max_drop=max_drop,
                tolerance=tolerance,
                precision=cast(Any, precision),
                keep=keep,
                budget_s=budget,
                out=out,
                device=device,
                backends=tuple(backend or ()),
                fresh=fresh,
            ),
            data=data,
            weights=weights,
            input_shapes=input_shape,
            input_dtype=input_dtype,
            on_event=live.event,
        )
    _print(result, as_json, text.optimize, report)
    if result.interrupted:
        raise typer.Exit(_EXIT_STOPPED)


@app.command(
    epilog=_examples(
        "suanli train digits-resnet -o my-run",
        "suanli train mnist-cnn --data DATA --to 98.5",
        "suanli train digits-resnet --resume -o my-run",
        "suanli train my.py:recipe --plan my-run/plan.json --max-seconds 600",
    )
)
def train(  # noqa: PLR0913, PLR0917
    workload: Annotated[
        str,
        typer.Argument(
            metavar="WORKLOAD",
            help="A built-in name, a recipe's, or file.py:name.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        str, typer.Option(metavar="WHAT", help="auto, default, or a file of a plan.")
    ] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Instead of the workload's own.", show_default=False),
    ] = None,
    to: Annotated[
        float | None,
        typer.Option(metavar="QUALITY", help="Stop at this quality.", show_default=False),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Train no longer than this.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Weights to start from.", show_default=False),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Parameters not to train; repeat for more.", show_default=False
        ),
    ] = None,
    lr_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=FACTOR",
            help="Parameters with another rate; repeat for more.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is random.")] = 0,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="For the search; by default a part of what the run will take.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="The run's folder.", show_default="runs/NAME"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the data sets.", show_default=False),
    ] = None,
    on_nan: Annotated[
        str, typer.Option(metavar="WHAT", help="stop, or rollback with half the rate.")
    ] = "stop",
    checkpoint: Annotated[
        float, typer.Option(metavar="S", help="Seconds between two checkpoints.")
    ] = 60.0,
    backup: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Second folder for checkpoints.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Encrypt checkpoints with it.", show_default=False),
    ] = None,
    tune: Annotated[int, typer.Option(metavar="N", help="Try so many hyper-parameters first.")] = 0,
    prune: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="2:4, or a fraction of weights to drop.", show_default=False
        ),
    ] = "",
    teacher: Annotated[
        str,
        typer.Option(
            metavar="WORKLOAD", help="Trained one to learn from as well.", show_default=False
        ),
    ] = "",
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Each process of torchrun keeps a part of the model.")
    ] = False,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier trials.")] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Train with the fastest verified plan, and never lose work.

    Batch, optimiser and epochs stay as written; how they are computed is searched, and each plan
    is held against a float64 reference. Ctrl-C stops after the step in hand; --resume goes on.
    """
    from suanli.reports import text
    from suanli.reports.training import train as show
    from suanli.training.calls import TrainOptions, train_workload

    check_report(report)
    options = TrainOptions(
        plan=plan,
        epochs=epochs,
        to=to,
        max_seconds=max_seconds,
        resume=resume,
        start=start,
        freeze=tuple(freeze or ()),
        lr_of=tuple(lr_of or ()),
        seed=seed,
        device=device,
        out=out,
        on_nan=on_nan,
        budget_s=budget,
        checkpoint_s=checkpoint,
        backup=backup,
        key=key,
        fresh=fresh,
        tune=tune,
        prune=prune,
        teacher=teacher,
        sharded=sharded,
    )
    first = rank() == 0  # of the processes that torchrun started
    with text.Live(quiet=as_json or not first) as live:
        result = train_workload(workload, options, data=data, on_event=live.event)
    if first:
        needed = {"--data": data, "--key": key, "--backup": backup}
        asked = [word for name, path in needed.items() if path for word in (name, str(path))]
        _print(result, as_json, partial(show, asked=(workload, *asked)), report)
    if result.interrupted:
        raise typer.Exit(_EXIT_STOPPED)


@app.command(epilog=_examples("suanli workloads", "suanli workloads --json"))
def workloads(as_json: Json = False) -> None:
    """List the built-in workloads."""
    from suanli import api
    from suanli.reports import text

    _print(api.workloads(), as_json, text.workloads)


cli_engines.register(app)
cli_predict.register(app)
cli_profile.register(app)
cli_kernel.register(app)
cli_queue.register(app)
cli_report.register(app)


def main() -> None:
    """Entry point of the command: every failure is one line and an exit code."""
    if sys.stdout is None or sys.stderr is None:  # closed by the shell: `suanli ... >&-`
        raise SystemExit(EXIT_FAILED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # nothing ends over a character
    code = 0
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:  # the output itself: its reader has gone, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError) and code == 0:
            typer.echo(f"suanli: {error.strerror}: standard output", err=True)
        code = EXIT_FAILED
    raise SystemExit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of a command line, after saying what went wrong."""
    code: Any
    try:
        # typer's own way out would print usage over several lines, and 1 for Ctrl-C
        code = typer.main.get_command(app).main(arguments, "suanli", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _EXIT_STOPPED
    except BrokenPipeError:
        raise
    except Exception as error:
        return _failed(error, arguments)
    if code == _EXIT_STOPPED:
        typer.echo("suanli: stopped", err=True)
    return code if isinstance(code, int) else 0


def _failed(error: Exception, arguments: list[str]) -> int:
    """Say in one line what went wrong; the traceback only where SUANLI_DEBUG asks for it."""
    code, next_step = EXIT_FAILED, ""
    if isinstance(error, SuanliError):
        words, code, next_step = str(error), error.exit_code, error.next_step
    elif isinstance(error, _UsageError):
        command = error.ctx.command_path if error.ctx else "suanli"
        code, next_step = EXIT_BAD_INPUT, f"see {command} --help"
        words = f"{error.format_message().rstrip('.')}; {next_step}"
        words = words[:1].lower() + words[1:]
    elif isinstance(error, OSError) and error.strerror:
        words = f"{error.strerror}: {error.filename or ''}".rstrip(": ")
    elif isinstance(error, ImportError):
        next_step = "suanli doctor says what is wrong"
        words = f"a library does not import: {error} ({next_step})"
    else:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        next_step = "run with SUANLI_DEBUG=1 for the traceback"
        words = f"internal error: {what}; {next_step}"
    words = " ".join(words.split())
    if os.environ.get("SUANLI_DEBUG"):
        traceback.print_exception(error)
    if "--json" in arguments:
        _write_error(words, error, next_step, code, arguments)
    typer.echo(f"suanli: {words}", err=True)
    return code


def _write_error(
    words: str, error: Exception, next_step: str, code: int, arguments: list[str]
) -> None:
    from suanli.base import schema
    from suanli.base.results import ErrorResult

    verb = next((word for word in arguments if not word.startswith("-")), "")
    _write_json(
        ErrorResult(
            schema=schema.name("error"),
            verb=verb,
            error=words,
            kind=type(error).__name__,
            next_step=next_step,
            exit_code=code,
        )
    )


if __name__ == "__main__":
    main()
