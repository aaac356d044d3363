"""What `suanli predict` returns, and prints with `--json`."""

from dataclasses import dataclass

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.memory import MemoryUse
from suanli.base.plan import Plan
from suanli.base.prediction import Interval, ParallelLayout
from suanli.base.results import SchemaName
from suanli.base.work import BoundBy


@dataclass(frozen=True, kw_only=True)
class LeastTime:
    """The speed of light of a predicted step: what the sheet's figures allow.

    Attributes:
        ms: Lower bound of one step.
        fraction: `ms` over the predicted median.
        simplest_ms: The articles' formula, work / (devices x printed dense rate): all products at
            full rate from the first moment to the last, and nothing else. It counts what the model
            does, also what an implementation may leave out, so that it can be above `ms`.
    """

    ms: float
    fraction: float
    simplest_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Money, where the user gave prices. The currency is the price file's.

    Attributes:
        per_hour: Of all devices.
        per_step: Of one step.
        per_million_samples: Of a million samples.
    """

    currency: str
    per_hour: float
    per_step: float
    per_million_samples: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One workload on one kind of device. Field meanings stand in docs/predict.md.

    Attributes:
        gpu: The card's name as it is typed; "cpu" for this machine's processor.
        batch: Samples in a step, over all devices.
        usable_bytes: Memory of one device that a process can get.
        energy_j: Joules of one step on all devices; None where the sheet has no power limit.
        sources: Documents and files that the figures rest on.
        widened: Why the interval is wider than on a card that was fitted.
        notes: What a person should know, one line each.
    """

    gpu: str
    n_devices: int
    batch: int
    layout: ParallelLayout
    plan: Plan
    step_ms: Interval
    samples_per_s: float
    fits: bool
    memory: MemoryUse
    usable_bytes: int
    energy_j: float | None
    power_w: float | None
    cost: Cost | None
    sol: LeastTime
    bound_by: BoundBy
    compute_ms: float
    memory_ms: float
    overhead_ms: float
    communication_ms: float
    sources: tuple[str, ...]
    widened: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PredictResult(Prediction):
    """What `suanli predict WORKLOAD --gpu NAME` found."""

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    mode: str
    flops: int
    parameters: int
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ranked(Prediction):
    """A card in the ranking.

    Attributes:
        job_s: Seconds for the whole job.
        job_cost: Money for it; None where the card has no price.
        job_energy_j: Joules for it.
        pareto: Whether no other card is better in one of time, money and energy and no worse in
            the others.
    """

    job_s: float
    job_cost: float | None
    job_energy_j: float | None
    pareto: bool


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A card that is out, and why."""

    gpu: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Here:
    """The same step on the machine at hand.

    Attributes:
        predicted_ms: From the ceilings that `suanli doctor` measured.
        measured_ms: Timed here; None where that was not asked for.
        batch: Samples in the step.
    """

    device: DeviceInfo
    batch: int
    predicted_ms: Interval
    measured_ms: float | None
    samples_per_s: float


@dataclass(frozen=True, kw_only=True)
class ChooseResult:
    """What `suanli predict WORKLOAD --choose` found.

    Attributes:
        samples: Samples of the whole job.
        ranked: Best first: by money where there are prices, else by time.
        here: The machine at hand, or None where its ceilings were never measured.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    mode: str
    batch: int
    n_devices: int
    samples: int
    flops: int
    parameters: int
    ranked: tuple[Ranked, ...]
    excluded: tuple[Excluded, ...]
    here: Here | None
    notes: tuple[str, ...] = ()
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CatalogueResult:
    """What `suanli predict --list` prints: cards by the name that is typed."""

    schema: SchemaName
    verb: str
    environment: Environment
    gpus: dict[str, GpuSheet]
