"""The commands `suanli report` and `suanli ui`: arguments to `suanli.api_report`, nothing else."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from suanli.cli_output import Json, examples, print_result, write_json


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=examples(
            "suanli report result.json -o report.html",
            "suanli report my-engine runs/resnet18-cifar -o report.html",
        )
    )(report)
    app.command(epilog=examples("suanli ui runs", "suanli ui . --port 8420"))(ui)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...",
            help="Files that --json wrote, folders of engines or of training runs.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Show any results as one self-contained HTML page with pictures.

    The page is one file, loads nothing from anywhere, and can be sent around.
    """
    from suanli import api_report

    found = api_report.report(results, out)
    size = f"{found.size_bytes / 1000:,.0f} kB"
    print_result(found, as_json, lambda _: typer.echo(f"The report is in {out} ({size})"))


def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Folder with results in it.")
    ] = Path(),
    port: Annotated[int, typer.Option(metavar="N", help="To listen on; 0 takes a free one.")] = 0,
    as_json: Json = False,
) -> None:
    """Show a folder of results in the browser, live while a search or a training goes on.

    Serves to this machine alone, and only to who has the address with its key. Ctrl-C ends it.
    """
    from suanli import api_report

    with api_report.ui(folder, port=port) as server:
        if as_json:
            write_json(api_report.ui_result(server))
        else:
            typer.echo(f"{server.folder} is shown at {server.url}")
            typer.echo("Ctrl-C ends it.", err=True)
        sys.stdout.flush()  # whoever reads the address from a pipe must not wait for the end
        server.serve()
