"""What `train` was asked, checked and with its defaults filled in."""

from dataclasses import dataclass, field
from pathlib import Path

from suanli.base.train_plan import TrainPlan
from suanli.training.run_folder import Keeping


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What `train` was asked, checked and with its defaults filled in.

    Attributes:
        plan: "auto", "default", or a plan.
        device: "cpu", "cuda:0", … or "auto", for the faster of the CPU and the first GPU.
        out: The run's folder.
        to: Quality at which to stop; above 1 it is a percentage, but for a loss.
        resume: Go on with the run in `out`.
        start: safetensors file of weights to start from.
        frozen: Patterns of parameter names that are not trained.
        on_nan: "stop", or "rollback" to the last checkpoint with half the rate.
        budget_s: Seconds for the search; None is a quarter of the run, at most 120 s
            or, where that is longer, a twentieth of it.
        fresh: Whether to forget earlier trials.
        prune: Already in the recipe; written into the run's record.
        teacher: The same.
        sharded: Of several processes each keeps its share of the model only.
        notes: Lines for the result that are known before the run.
    """

    plan: str | TrainPlan
    device: str
    out: Path
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    max_seconds: float | None = None
    to: float | None = None
    resume: bool = False
    start: Path | None = None
    frozen: tuple[str, ...] = ()
    on_nan: str = "stop"
    budget_s: float | None = None
    fresh: bool = False
    prune: str = ""
    teacher: str = ""
    sharded: bool = False
    notes: tuple[str, ...] = ()
    keeping: Keeping = field(default_factory=Keeping)
