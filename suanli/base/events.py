"""What long work tells while it goes on. The listener decides how to show it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from suanli.base.train_results import TrainProgress
from suanli.base.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Event:
    """One step of long work.

    Attributes:
        kind: "step" (now doing `text`), "trial" (one trial is done), "note" (a person should know),
            "progress" (a training run goes on).
        text: One line.
        trial: The trial that is done.
        progress: Where the run stands.
        spent_s: Seconds of the budget that are gone; None outside a search.
        budget_s: The whole budget in seconds.
    """

    kind: Literal["step", "trial", "note", "progress"]
    text: str
    trial: Trial | None = None
    progress: TrainProgress | None = None
    spent_s: float | None = None
    budget_s: float | None = None


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that shows nothing."""
