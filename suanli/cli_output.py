"""What all commands share: how a result is printed, and options with one meaning everywhere."""

import json
import sys
from typing import Annotated, Any

import typer

WORKLOAD = typer.Argument(
    metavar="WORKLOAD",
    help="A built-in name, file.py:name, model.onnx, model.keras, or hf:CONFIG.",
    show_default=False,
)
Budget = Annotated[float, typer.Option(metavar="SECONDS", help="Time for all of it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

EXIT_STOPPED = 130  # what a shell gives for a command that Ctrl-C ended


def examples(*lines: str) -> str:
    """Text below a command's options. Its first character keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def print_result(result: Any, as_json: bool, render: Any) -> None:
    """Print a verb's result as JSON, or as `render` does."""
    if as_json:
        write_json(result)
    else:
        render(result)


def write_json(record: Any) -> None:
    """Print a record as JSON in whatever encoding the output has."""
    from suanli.base import codec

    text = codec.dumps(record)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # the locale lacks a character: escapes say the same
        text = json.dumps(codec.to_json(record), indent=2, allow_nan=False) + "\n"
    sys.stdout.write(text)
