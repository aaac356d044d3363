"""The commands `suanli kernel explain|check|tune`: arguments to `suanli.api_kernel`."""

from typing import Annotated

import typer

from suanli.base.errors import EXIT_FAILED
from suanli.cli_output import EXIT_STOPPED, Budget, Json, examples, print_result

_Kernel = Annotated[
    str,
    typer.Argument(
        metavar="KERNEL",
        help="file.py, file.py:name, or a kernel that ships.",
        show_default=False,
    ),
]
_Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="Limit of one compilation or launch.")
]
_Gpu = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A card of the catalogue, such as H200.", show_default=False),
]
_Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Of the main input, such as bf16.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        rich_markup_mode=None,
        no_args_is_help=True,
        help="Explain, check and tune a CUDA or Triton kernel, GPU or not.",
    )
    group.command(
        epilog=examples(
            "suanli kernel explain transpose.py:naive",
            "suanli kernel explain matmul.py --arch sm_80,sm_90 --gpu 'H100 SXM5 80GB' --json",
        )
    )(explain)
    group.command(
        epilog=examples("suanli kernel check matmul.py", "suanli kernel check norm --json")
    )(check)
    group.command(
        epilog=examples(
            "suanli kernel tune matmul.py", "suanli kernel tune norm --gpu H200 --budget 120"
        )
    )(tune)
    app.add_typer(group, name="kernel")


def explain(
    kernel: _Kernel,
    arch: Annotated[
        str, typer.Option(metavar="NAMES", help="Architectures, with commas between.")
    ] = "sm_80,sm_90,sm_100",
    gpu: _Gpu = None,
    dtype: _Dtype = None,
    timeout: _Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Say what a kernel needs on each architecture, and what bounds it.

    Registers, spills, shared memory, instructions and occupancy from the compiler; memory accesses
    from blocks that are executed on the CPU. Nothing is timed.
    """
    from suanli import api_kernel
    from suanli.reports import kernel_text

    archs = tuple(name.strip() for name in arch.split(",") if name.strip())
    with kernel_text.Live(quiet=as_json) as live:
        result = api_kernel.kernel_explain(
            kernel, archs=archs, gpu=gpu, dtype=dtype, timeout_s=timeout, on_event=live.event
        )
    print_result(result, as_json, kernel_text.explain)


def check(
    kernel: _Kernel,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda:0 and so on, or auto.")
    ] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random inputs.")] = 0,
    timeout: _Timeout = 120.0,
    as_json: Json = False,
) -> None:
    """Hold a kernel to its reference, and find races, bounds and barriers that are wrong.

    CUDA C++ is executed on the CPU, thread by thread; Triton by its interpreter; both on the GPU
    where there is one. The exit code is 1 where the kernel is wrong.
    """
    from suanli import api_kernel
    from suanli.reports import kernel_text

    with kernel_text.Live(quiet=as_json) as live:
        result = api_kernel.kernel_check(
            kernel, device=device, seed=seed, timeout_s=timeout, on_event=live.event
        )
    print_result(result, as_json, kernel_text.check)
    if not result.ok:
        raise typer.Exit(EXIT_FAILED)


def tune(
    kernel: _Kernel,
    gpu: _Gpu = None,
    dtype: _Dtype = None,
    most: Annotated[
        int, typer.Option(metavar="N", help="Configurations that are compiled at most.")
    ] = 400,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Limit of one compilation.")
    ] = 60.0,
    budget: Budget = 600.0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not go on with a run that was cut short.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest configuration whose answer is right.

    On a GPU configurations are timed, verified and raced. Without one, or with --gpu, they are
    ranked by a static model, and the result says that it is a ranking. Ctrl-C or the end of the
    budget keep what was found, and the same command goes on with it.
    """
    from suanli import api_kernel
    from suanli.reports import kernel_text

    with kernel_text.Live(quiet=as_json) as live:
        result = api_kernel.kernel_tune(
            kernel,
            gpu=gpu,
            dtype=dtype,
            most=most,
            timeout_s=timeout,
            budget_s=budget,
            fresh=fresh,
            on_event=live.event,
        )
    print_result(result, as_json, kernel_text.tune)
    if result.interrupted:
        raise typer.Exit(EXIT_STOPPED)
    if result.config is None:
        raise typer.Exit(EXIT_FAILED)
