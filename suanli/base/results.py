"""What the verbs return, and print with `--json`."""

from dataclasses import dataclass

from suanli.base.hardware import (
    BackendStatus,
    Ceiling,
    CpuInfo,
    DeviceInfo,
    Environment,
    GpuInfo,
    Problem,
)
from suanli.base.plan import Plan
from suanli.base.timing import Estimate
from suanli.base.trial import Quality, Trial, ValueCheck
from suanli.base.work import SpeedOfLight


@dataclass(frozen=True, kw_only=True)
class SchemaName:
    """Which JSON Schema describes an object."""

    name: str
    version: int


@dataclass(frozen=True, kw_only=True)
class TimedPlan:
    """A plan with its step time in the confirmation race."""

    plan: Plan
    step_ms: Estimate
    samples_per_s: float


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The race at one batch size, on timings that the search did not use.

    Attributes:
        speedup_vs_eager: Eager fp32's step over the chosen one's; None where only the best baseline
            was raced, which is so at the batch sizes that were not asked for.
        speedup_vs_best_baseline: The best verified baseline's step over the chosen one's.
        baseline_ms: The best verified baseline's own step, in the same race; None in engines of
            versions that did not keep it.
        variant: Which of the engine's plans serves this batch size.
        note: What is said when the plan does not win here; "" where it does.
    """

    batch: int
    step_ms: Estimate
    samples_per_s: float
    speedup_vs_eager: Estimate | None
    speedup_vs_best_baseline: Estimate
    best_baseline: Plan
    variant: int = 0
    note: str = ""
    baseline_ms: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizeResult:
    """What `suanli optimize` found. Field meanings stand in docs/optimize.md.

    Attributes:
        values: Check of the engine's floating-point plans in a fresh process; None without one.
        relative_error: Largest rms error of an output over the reference's rms where a quantised
            plan answers, in a fresh process; None without one.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    objective: str
    batch: int
    max_batch: int
    untrained: bool
    baseline: TimedPlan
    chosen: TimedPlan
    speedup_vs_eager: Estimate
    speedup_vs_best_baseline: Estimate
    quality: Quality | None
    values: ValueCheck | None
    sol: SpeedOfLight | None
    trials: tuple[Trial, ...]
    confirmations: tuple[Confirmation, ...]
    engine_dir: str | None
    ceilings: tuple[Ceiling, ...]
    flops: int
    parameters: int
    seconds_spent: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    relative_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """What `suanli doctor` found.

    Attributes:
        measured_at: When the ceilings were measured (ISO 8601, UTC); "" where they were not.
    """

    schema: SchemaName
    verb: str
    workload: str | None
    device: DeviceInfo
    environment: Environment
    cpu: CpuInfo
    gpus: tuple[GpuInfo, ...]
    backends: tuple[BackendStatus, ...]
    problems: tuple[Problem, ...]
    ceilings: tuple[Ceiling, ...]
    compiler: str | None = None
    seconds_spent: float = 0.0
    measured_at: str = ""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `suanli run` computed.

    Attributes:
        differences: What differs from the machine that the engine was measured on.
        portable: Whether the portable plan answered.
        call_ms: Milliseconds of the one call.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    engine_dir: str
    plan: Plan
    portable: bool
    differences: tuple[str, ...]
    output: str | None
    output_names: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    call_ms: float


@dataclass(frozen=True, kw_only=True)
class WorkloadEntry:
    """A built-in workload in the list of `suanli workloads`."""

    name: str
    note: str


@dataclass(frozen=True, kw_only=True)
class WorkloadsResult:
    """What `suanli workloads` lists."""

    schema: SchemaName
    verb: str
    workload: str | None
    device: DeviceInfo
    environment: Environment
    workloads: tuple[WorkloadEntry, ...]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `suanli export` wrote.

    Attributes:
        device: What the engine was built for.
        kind: "onnx" or "safetensors".
        output: The file, or the folder.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    engine_dir: str
    kind: str
    output: str


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A key that may vouch for engines.

    Attributes:
        fingerprint: Sixteen hexadecimal digits of its SHA-256.
        public_key: Its 32 bytes as base64, to be given to others.
    """

    fingerprint: str
    public_key: str


@dataclass(frozen=True, kw_only=True)
class TrustResult:
    """Whose engines open here.

    Attributes:
        own: The user's own key.
        trusted: The keys of others.
        added: Fingerprint of the key that is trusted from now on; "" where none was given.
        removed: Fingerprint of the key that is trusted no more.
    """

    schema: SchemaName
    verb: str
    workload: str | None
    device: DeviceInfo
    environment: Environment
    own: PublicKey
    trusted: tuple[PublicKey, ...]
    added: str = ""
    removed: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What `suanli report` wrote.

    Attributes:
        output: The page.
        size_bytes: Its size.
        results: What it shows, top to bottom, such as "optimize resnet50".
    """

    schema: SchemaName
    verb: str
    workload: str | None
    device: DeviceInfo
    environment: Environment
    output: str
    size_bytes: int
    results: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class UiResult:
    """Where `suanli ui` serves; printed when it begins.

    Attributes:
        url: The address to open, with the key that opens it.
        folder: What is shown.
    """

    schema: SchemaName
    verb: str
    workload: str | None
    device: DeviceInfo
    environment: Environment
    url: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class ErrorResult:
    """What a verb prints with `--json` when it fails.

    Attributes:
        error: One line.
        kind: Name of the error's class.
        next_step: What the person can do about it, or "".
        exit_code: 2 where what was given cannot be used, else 1.
    """

    schema: SchemaName
    verb: str
    error: str
    kind: str
    next_step: str
    exit_code: int
