"""The commands `suanli queue add|list|run|remove`: arguments to `suanli.api_queue`."""

from typing import Annotated, Any

import typer

from suanli.cli_output import EXIT_STOPPED, Json, examples, print_result

# what stands behind the verb belongs to the verb
_REST = {"allow_interspersed_args": False, "ignore_unknown_options": False}


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        rich_markup_mode=None,
        no_args_is_help=True,
        help="Keep jobs, and run one at a time on each device.",
    )
    group.command(
        context_settings=_REST,
        epilog=examples(
            "suanli queue add train cifar10-fast --data DATA --epochs 18",
            "suanli queue add --device cpu --memory 4 --time 600 train my.py:recipe",
            "suanli queue add --print slurm train digits-resnet -o my-run",
        ),
    )(add)
    group.command(name="list", epilog=examples("suanli queue list", "suanli queue list --json"))(
        list_
    )
    group.command(epilog=examples("suanli queue run"))(run)
    group.command(epilog=examples("suanli queue remove 3"))(remove)
    app.add_typer(group, name="queue")


def add(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="VERB WORKLOAD [OPTIONS]",
            help="train or optimize, with what belongs to it.",
            show_default=False,
        ),
    ],
    device: Annotated[str, typer.Option(metavar="NAME", help="Where it has to run.")] = "auto",
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="What it needs; else predicted.", show_default=False),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long it takes.", show_default=False),
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            "--print",
            metavar="NAME",
            help="Queue nothing: print the line for slurm or kubernetes.",
            show_default=False,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Put a command at the end of the queue.

    What it needs is what an earlier job like it took, else what `suanli predict` expects. A run of
    train gets a folder of its own where -o names none.
    """
    from suanli import api_queue
    from suanli.reports import queue_text, text

    words = tuple(command)
    _parsed(context, words)
    asked: dict[str, Any] = {"device": device, "memory_gb": memory, "seconds": time}
    with text.Live(quiet=as_json or bool(scheduler)) as live:
        if scheduler:
            line = api_queue.line(scheduler, words, **asked, on_event=live.event)
        else:
            result = api_queue.add(words, **asked, on_event=live.event)
    if scheduler:
        typer.echo(line)
    else:
        print_result(result, as_json, queue_text.queue)


def list_(as_json: Json = False) -> None:
    """List the jobs: what waits, runs, is done, and why it failed."""
    from suanli import api_queue
    from suanli.reports import queue_text

    print_result(api_queue.listed(), as_json, queue_text.queue)


def run(as_json: Json = False) -> None:
    """Work the queue off, one job at a time on each device.

    Ctrl-C lets the running jobs save; the next call goes on with them.
    """
    from suanli import api_queue
    from suanli.reports import queue_text, text

    with text.Live(quiet=as_json) as live:
        result = api_queue.run(on_event=live.event)
    print_result(result, as_json, queue_text.queue)
    if result.interrupted:
        raise typer.Exit(EXIT_STOPPED)


def remove(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Of the job.")],
    as_json: Json = False,
) -> None:
    """Take a job off the queue."""
    from suanli import api_queue
    from suanli.reports import queue_text

    print_result(api_queue.remove(number), as_json, queue_text.queue)


def _parsed(context: typer.Context, words: tuple[str, ...]) -> None:
    """Let the verb itself look at its options now, and not when the job starts."""
    root: Any = context.find_root().command
    verb = root.commands.get(words[0])
    if verb is not None:
        verb.make_context(words[0], list(words[1:]), parent=context.find_root())
