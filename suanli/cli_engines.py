"""The commands of an engine that exists: run, rebuild, export and trust."""

from pathlib import Path
from typing import Annotated

import typer

from suanli.cli_output import EXIT_STOPPED, Budget, Json, examples, print_result

Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Folder of an engine.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run code of an engine made by somebody else.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=examples("suanli run my-engine --input images.npy --output logits.npy"))(run)
    app.command(epilog=examples("suanli rebuild my-engine"))(rebuild)
    app.command(epilog=examples("suanli export my-engine --onnx -o model.onnx"))(export)
    app.command(
        epilog=examples(
            "suanli trust", "suanli trust colleague.pub", "suanli trust --remove 0123456789abcdef"
        )
    )(trust)


def run(
    engine: Engine,
    input_: Annotated[
        list[Path],
        typer.Option(
            "-i",
            "--input",
            metavar="FILE",
            help=".npy of one input, or .npz of all; repeat in order.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help=".npy or .npz to write.", show_default=False
        ),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Call an engine on a file."""
    from suanli import api
    from suanli.reports import text

    result = api.run(engine, input_, output=output, trust=trust)
    print_result(result, as_json, text.run)


def rebuild(
    engine: Engine,
    budget: Budget = 120.0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Make an engine anew on this machine, from what it carries."""
    from suanli import api
    from suanli.reports import text

    with text.Live(quiet=as_json) as live:
        result = api.rebuild(engine, budget_s=budget, trust=trust, on_event=live.event)
    print_result(result, as_json, text.optimize)
    if result.interrupted:
        raise typer.Exit(EXIT_STOPPED)


def export(
    engine: Engine,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="PATH", help="File or folder to write.")
    ],
    onnx: Annotated[bool, typer.Option("--onnx", help="As plain ONNX, in fp32.")] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Give an engine out: plain ONNX, or safetensors and plan."""
    from suanli import api
    from suanli.reports import text

    result = api.export(engine, out, kind="onnx" if onnx else "safetensors", trust=trust)
    print_result(result, as_json, text.export)


def trust(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="A public key, or a file of one.", show_default=False),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Withdraw the trust in KEY, or its fingerprint.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show your key, and whose engines may run code here.

    With KEY its owner's engines open here from now on, and may run any code with your rights.
    """
    from suanli import api
    from suanli.base.errors import BadInputError
    from suanli.reports import text

    if remove and key is None:
        raise BadInputError("--remove needs a key", next_step="`suanli trust` lists them")
    print_result(api.trust(key, remove=remove), as_json, text.trust)
