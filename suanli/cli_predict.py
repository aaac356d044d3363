"""The command `suanli predict`: arguments to `suanli.api`, nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from suanli.base.errors import BadInputError
from suanli.cli_output import WORKLOAD, Json, Report, check_report, examples, print_result


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=examples(
            "suanli predict resnet50 --gpu l40s --train --batch 256 --dtype bf16",
            "suanli predict bert-base --choose --dtype fp16 --prices prices.toml",
            "suanli predict --list",
        )
    )(predict)


def predict(  # noqa: PLR0913, PLR0917
    workload: Annotated[str, WORKLOAD] = "",
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The card, such as h100-sxm5-80gb, or cpu.", show_default=False
        ),
    ] = "",
    choose: Annotated[
        bool, typer.Option("--choose", help="Rank all catalogued cards for the job.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the catalogued cards.")] = False,
    train: Annotated[
        bool, typer.Option("--train/--infer", help="A training step, or inference.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples in a step over all GPUs.", show_default=False),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="fp32, tf32, bf16, fp16, fp8 or int8.")
    ] = "fp32",
    plan: Annotated[
        str, typer.Option(metavar="PLAN", help="eager, compiled, or a plan's file.")
    ] = "eager",
    gpus: Annotated[int, typer.Option(metavar="N", help="How many of them.")] = 1,
    layout: Annotated[
        str,
        typer.Option(
            metavar="PARTS", help="dp=2,tp=4,pp=1,micro=8,sharded,recompute; else searched."
        ),
    ] = "",
    network: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Of a server, one way.", show_default=False),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(metavar="NAME", help="sgd, sgd-momentum, adam or adamw.", show_default=False),
    ] = "",
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Earlier tokens kept per sample (KV cache).")
    ] = 0,
    prices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML of prices by the hour.", show_default=False),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", help="Samples of the whole job, for --choose.")
    ] = 1_000_000,
    max_cost: Annotated[
        float | None, typer.Option(metavar="MONEY", help="For the job.", show_default=False)
    ] = None,
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help="For the job: 90s, 30m, 2h, 3d.", show_default=False),
    ] = "",
    max_power: Annotated[
        float | None, typer.Option(metavar="W", help="Of one card.", show_default=False)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --choose, time some steps here too.")
    ] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Say what a workload would do on GPUs that are not here.

    Time with an interval, memory by kind, energy and cost, from the card's sheet and the
    workload's operators. Nothing is run and no GPU is needed.
    """
    from suanli import api_predict as api
    from suanli.reports import predict_text, text

    if listed:
        print_result(api.gpus(), as_json, predict_text.gpus)
        return
    if not workload:
        raise BadInputError("predict needs a workload", next_step="suanli workloads lists them")
    if choose == bool(gpu):
        raise BadInputError(
            "give --gpu NAME or --choose", next_step="suanli predict --list names the cards"
        )
    if not choose and (max_cost is not None or deadline or max_power is not None or measure):
        raise BadInputError("--max-cost, --deadline, --max-power and --measure go with --choose")
    check_report(report)
    ask = api.options(
        training=train,
        batch=batch,
        dtype=dtype,
        plan=plan,
        devices=gpus,
        layout=layout,
        network_gb_per_s=network,
        optimizer=optimizer,
        context=context,
    )
    with text.Live(quiet=as_json) as live:
        if choose:
            limits = api.limits(
                samples=samples, max_cost=max_cost, deadline=deadline, max_power_w=max_power
            )
            ranking = api.choose(
                workload, ask, limits, prices=prices, timed=measure, on_event=live.event
            )
        else:
            found = api.predict(workload, gpu=gpu, ask=ask, prices=prices, on_event=live.event)
    if choose:
        print_result(ranking, as_json, predict_text.choose, report)
    else:
        print_result(found, as_json, predict_text.predict, report)
