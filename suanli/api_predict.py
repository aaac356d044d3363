"""Layer 7: the verb `suanli predict` in Python."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.base.events import Listener, ignore
from suanli.base.predict_results import CatalogueResult, ChooseResult, PredictResult

if TYPE_CHECKING:
    from torch import nn

    from suanli.predicting.ask import Ask
    from suanli.predicting.choose import Limits
    from suanli.workloads.record import Workload


def predict(
    workload: "str | nn.Module | Workload",
    inputs: Any = None,
    *,
    gpu: str,
    ask: "Ask | None" = None,
    prices: Path | None = None,
    on_event: Listener = ignore,
    **fields: Any,
) -> PredictResult:
    """Say what a step would take on a card that is not here.

    Args:
        workload: A reference, a `Workload`, or an `nn.Module` with example inputs.
        inputs: As for `optimize`, where a module is given.
        gpu: The card, such as "h100-sxm5-80gb", or "cpu" for this machine's processor.
        ask: How it is to run; else it is made of `fields`.
        prices: TOML file of prices by the hour.
        on_event: Told what is going on.
        **fields: Fields of `suanli.predicting.ask.Ask`.

    Raises:
        BadInputError: The card is unknown or cannot do it, or an option makes no sense.
        CaptureError: The workload cannot run without data.
    """
    from suanli.base.errors import BadInputError
    from suanli.predicting import verb

    if not isinstance(gpu, str):
        raise BadInputError(
            f"gpu must be a card's name, not {gpu!r}", next_step="suanli predict --help"
        )
    asked = ask or options(**fields)
    return verb.predict(_made(workload, inputs), gpu, asked, prices=prices, on_event=on_event)


def choose(
    workload: "str | nn.Module | Workload",
    ask: "Ask",
    asked: "Limits",
    *,
    inputs: Any = None,
    prices: Path | None = None,
    timed: bool = False,
    on_event: Listener = ignore,
) -> ChooseResult:
    """Rank all catalogued cards for a job; see `predict`."""
    from suanli.predicting import verb

    made = _made(workload, inputs)
    return verb.choose(made, ask, asked, prices=prices, timed=timed, on_event=on_event)


def options(**fields: Any) -> "Ask":
    """How a predicted step is to run: fields of `suanli.predicting.ask.Ask`.

    Raises:
        BadInputError: One makes no sense.
    """
    from dataclasses import fields as fields_of

    from suanli.base.errors import BadInputError
    from suanli.predicting.ask import Ask

    known = [item.name for item in fields_of(Ask)]
    for name in fields:
        if name not in known:
            raise BadInputError(f"predict has no {name!r}", next_step=f"one of {', '.join(known)}")
    return Ask(**fields).checked()


def limits(*, deadline: str = "", **fields: Any) -> "Limits":
    """What a chosen card must keep: fields of `suanli.predicting.choose.Limits`.

    Raises:
        BadInputError: The deadline is no time such as "2h".
    """
    from suanli.predicting.choose import Limits, parse_time

    return Limits(deadline_s=parse_time(deadline) if deadline else None, **fields)


def gpus() -> CatalogueResult:
    """All catalogued cards by the name that is typed."""
    from suanli.predicting import verb

    return verb.gpus()


def _made(workload: "str | nn.Module | Workload", inputs: Any) -> "Workload":
    from torch import nn

    from suanli.workloads.module import of_module
    from suanli.workloads.resolve import resolve

    if isinstance(workload, str):
        return resolve(workload)
    return of_module(workload, inputs) if isinstance(workload, nn.Module) else workload
