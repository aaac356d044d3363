"""What all commands share: how a result is printed, and options with one meaning everywhere."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

WORKLOAD = typer.Argument(
    metavar="WORKLOAD",
    help="A built-in name, file.py:name, model.onnx, model.keras, or hf:CONFIG.",
    show_default=False,
)
Budget = Annotated[float, typer.Option(metavar="SECONDS", help="Time for all of it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Write it as an HTML page too.", show_default=False
    ),
]

EXIT_STOPPED = 130  # what a shell gives for a command that Ctrl-C ended


def examples(*lines: str) -> str:
    """Text below a command's options. Its first character keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def print_result(result: Any, as_json: bool, render: Any, report: Path | None = None) -> None:
    """Print a verb's result as JSON, or as `render` does; write it as a page where one is named."""
    if as_json:
        write_json(result)
    else:
        render(result)
    if report is not None:
        from suanli import api_report

        api_report.report(result, report)
        typer.echo(f"The report is in {report}", err=True)


def check_report(report: Path | None) -> None:
    """Refuse a report that could not be written before the work is done.

    Raises:
        BadInputError: It is a folder, or no HTML file's name.
    """
    if report is not None:
        from suanli.reports.html.report import check_target

        check_target(report)


def write_json(record: Any) -> None:
    """Print a record as JSON in whatever encoding the output has."""
    from suanli.base import codec

    text = codec.dumps(record)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # the locale lacks a character: escapes say the same
        text = json.dumps(codec.to_json(record), indent=2, allow_nan=False) + "\n"
    sys.stdout.write(text)
