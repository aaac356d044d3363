"""Arguments to verbs. No logic here: every command calls `suanli.api` and prints what came back."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from suanli import __version__
from suanli.base.errors import EXIT_FAILED, SuanliError

app = typer.Typer(
    name="suanli",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Finds the fastest verified way to run a model on this machine, and proves that the "
    "answer stayed right.",
)

_WORKLOAD = typer.Argument(
    help="A built-in name, file.py:name, model.onnx, model.keras, or hf:CONFIG.", show_default=False
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"suanli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Root options."""


@app.command()
def doctor(
    as_json: Json = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure the ceilings anew (about 20 s).")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, … or auto.")] = "auto",
) -> None:
    """Say what is here, what is missing, and what this machine can do at most.

    Example: suanli doctor --refresh
    """
    from suanli import api
    from suanli.reports import text

    with text.Live(quiet=as_json) as live:
        result = api.doctor(device=device, refresh=refresh, on_event=live.event)
    _print(result, as_json, text.doctor)


@app.command()
def optimize(  # noqa: PLR0913, PLR0917
    workload: Annotated[str, _WORKLOAD],
    objective: Annotated[
        str, typer.Option("--for", help="latency (batch 1) or throughput (batch 32).")
    ] = "latency",
    batch: Annotated[
        int | None, typer.Option(help="Samples in a step.", show_default=False)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch the engine takes.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Largest drop of quality in percentage points.")
    ] = 0.5,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Accept quantised plans without labels up to this relative error.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds to search.")] = 120.0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the engine.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the workload's data.", show_default=False)
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file for the model.", show_default=False)
    ] = None,
    input_shape: Annotated[
        str, typer.Option(help="Shape of one sample of each input, such as 3x224x224,128.")
    ] = "",
    input_dtype: Annotated[str, typer.Option(help="Type of the inputs, such as int64.")] = "",
    backend: Annotated[
        list[str] | None, typer.Option(help="Try only this backend; repeat for more.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, … or auto.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier trials.")] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest verified engine for inference.

    Example: suanli optimize resnet50 --for throughput --batch 32 -o resnet50-engine
    """
    from suanli import api
    from suanli.reports import text

    with text.Live(quiet=as_json) as live:
        result = api.optimize_workload(
            workload,
            api.OptimizeOptions(
                objective=cast(Any, objective),
                batch=batch,
                max_batch=max_batch,
                max_drop=max_drop,
                tolerance=tolerance,
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
    _print(result, as_json, text.optimize)
    if result.engine_dir is None and not result.interrupted and out is not None:
        raise typer.Exit(2)
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def run(
    engine: Annotated[Path, typer.Argument(help="Folder of an engine.")],
    input_: Annotated[
        list[Path],
        typer.Option("--input", "-i", help=".npy of one input, or .npz of all; repeat in order."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy or .npz to write.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code of an engine made by somebody else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Call an engine on a file.

    Example: suanli run resnet50-engine --input images.npy --output logits.npy
    """
    from suanli import api
    from suanli.reports import text

    result = api.run(engine, input_, output=output, trust=trust)
    _print(result, as_json, text.run)


@app.command()
def rebuild(
    engine: Annotated[Path, typer.Argument(help="Folder of an engine.")],
    budget: Annotated[float, typer.Option(help="Seconds to search.")] = 120.0,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code of an engine made by somebody else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an engine anew on this machine, from the program that it carries.

    Example: suanli rebuild resnet50-engine
    """
    from suanli import api
    from suanli.reports import text

    with text.Live(quiet=as_json) as live:
        result = api.rebuild(engine, budget_s=budget, trust=trust, on_event=live.event)
    _print(result, as_json, text.optimize)


@app.command()
def export(
    engine: Annotated[Path, typer.Argument(help="Folder of an engine.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File or folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="As plain ONNX, in fp32.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code of an engine made by somebody else.")
    ] = False,
) -> None:
    """Give an engine out: plain ONNX, or safetensors with the plan.

    Example: suanli export resnet50-engine --onnx -o resnet50.onnx
    """
    from suanli import api

    path = api.export(engine, out, kind="onnx" if onnx else "safetensors", trust=trust)
    typer.echo(f"wrote {path}")


@app.command()
def workloads(as_json: Json = False) -> None:
    """List the built-in workloads.

    Example: suanli workloads
    """
    from suanli import api
    from suanli.reports import text

    _print(api.workloads(), as_json, text.workloads)


def _print(result: Any, as_json: bool, render: Any) -> None:
    from suanli.base import codec

    if as_json:
        sys.stdout.write(codec.dumps(result))
    else:
        render(result)


def main() -> None:
    """Entry point of the command: a foreseen failure is one line and an exit code."""
    try:
        app(standalone_mode=True)
    except SuanliError as error:
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": str(error), "kind": type(error).__name__}) + "\n")
        typer.echo(f"suanli: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("suanli: stopped", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(EXIT_FAILED) from None
    except OSError as error:
        typer.echo(
            f"suanli: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True
        )
        raise SystemExit(EXIT_FAILED) from None


if __name__ == "__main__":
    main()
