"""What `suanli profile` gives back: where a step's time goes, and what to change."""

from dataclasses import dataclass
from typing import Literal

from suanli.base.hardware import Ceiling, DeviceInfo, Environment
from suanli.base.memory import MemoryUse
from suanli.base.plan import Plan
from suanli.base.results import SchemaName
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.base.work import BoundBy, Phase, SpeedOfLight

ChangeKind = Literal[
    "data",
    "synchronisation",
    "overhead",
    "precision",
    "layout",
    "compile",
    "fusion",
    "batch",
    "optimizer",
    "quantization",
    "backend",
    "memory",
]
Track = Literal["phase", "host", "device", "data"]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the milliseconds of one step go; the parts add up to the step within 5 %.

    Attributes:
        forward_ms: Operators of the forward pass and the loss.
        backward_ms: Operators of the backward pass.
        optimizer_ms: The update: clipping, the optimiser's operators, zeroing of gradients.
        data_ms: The step waits for its batch.
        transfer_ms: Copies between host and device.
        communication_ms: The step waits for other processes.
        idle_ms: Between operators: Python, dispatch and launches, when nothing is computed.
    """

    forward_ms: float
    backward_ms: float = 0.0
    optimizer_ms: float = 0.0
    data_ms: float = 0.0
    transfer_ms: float = 0.0
    communication_ms: float = 0.0
    idle_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """The sum of the parts."""
        computed = self.forward_ms + self.backward_ms + self.optimizer_ms
        return computed + self.data_ms + self.transfer_ms + self.communication_ms + self.idle_ms


@dataclass(frozen=True, kw_only=True)
class OperatorProfile:
    """The calls of one operator in one place of the model, in one step.

    Attributes:
        name: As in `Operator.name`; a layer that a backend fused has the main operator's.
        module: Path of the module; "" where unknown.
        source: "file.py:line" of the user's code; "" where unknown.
        count: Calls in a step.
        time_ms: Measured, of all these calls together.
        flops: Operations as captured; 0 for what the model does not need (copies, conversions).
        bytes: Bytes read and written, as captured, at the plan's width.
        bound_by: The ceiling that binds it: "compute" or "memory"; "overhead" where the call
            itself takes longer than either.
        sol_ms: Least time that the ceilings allow for it by itself; None without ceilings.
        phase: Part of the step.
        dtype: Element type that it ran in, as far as known.
        intensity: Operations per byte; None without bytes.
        flops_per_s: Achieved; None without operations.
        bytes_per_s: Achieved; None without bytes.
        lost_ms: `time_ms` less `sol_ms`; None without ceilings.
        share: Part of the step, 0 to 1.
        fused: Names of the captured operators that ran as this one, where a compiler or a backend
            fused them.
        kernel: The library's or device's name of what ran; "" where it is not known.
    """

    name: str
    module: str
    source: str
    count: int
    time_ms: float
    flops: int
    bytes: int
    bound_by: BoundBy
    sol_ms: float | None
    phase: Phase = "forward"
    dtype: str = ""
    intensity: float | None = None
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    lost_ms: float | None = None
    share: float = 0.0
    fused: tuple[str, ...] = ()
    kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class LostTime:
    """Part of the way from the measured step down to the speed of light.

    Attributes:
        cause: In words, such as "memory traffic that fusion would avoid".
        bound_by: Which kind of limit it is.
        ms: Milliseconds of a step.
    """

    cause: str
    bound_by: BoundBy
    ms: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change, the gain that is expected of it, and, where it was tried, the measured one.

    Attributes:
        change: In words, such as "run the products in bf16".
        kind: What sort of change it is.
        reason: What in the profile speaks for it.
        how: The command, option or line that does it.
        expected_speedup: Step before over step after, from the cost model (samples per second
            after over before where the batch changes).
        measured_speedup: The same, raced by `--check`; None where it was not tried.
        plan: The plan with the change in it; None where the change is not the plan's.
        batch: Samples in a step with the change in it; None where they stay as many. The speed-up
            then is that of the samples per second.
        failed: Why the check could not run it; "" where it ran or was not tried.
    """

    change: str
    kind: ChangeKind
    reason: str
    how: str
    expected_speedup: float
    measured_speedup: Estimate | None = None
    plan: Plan | TrainPlan | None = None
    batch: int | None = None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """Memory at the fullest moment of a step.

    Attributes:
        weights_bytes: Parameters and buffers.
        gradients_bytes: Gradients that are held.
        optimizer_bytes: States of the optimiser.
        activations_bytes: Inputs, what passes between operators, what the backward pass needs.
        workspace_bytes: Scratch space that libraries took through torch.
        total_bytes: The sum, as the allocator saw it.
        predicted: The same from the cost model; None where the step cannot be followed.
        process_bytes: Largest resident size of the process, libraries included; None if unknown.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    total_bytes: int
    predicted: MemoryUse | None = None
    process_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SlowStep:
    """A step that took much longer than the median.

    Attributes:
        step: Its number among those timed, from 0.
        cause: In words; "" where it cannot be told.
    """

    step: int
    ms: float
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much steps differ.

    Attributes:
        steps: How many were timed one by one.
        spread: (third quartile - first quartile) / median.
        slowest_ms: The longest of them.
        outliers: Those above the median by more than five times the spread, and by a fifth.
    """

    steps: int
    spread: float
    slowest_ms: float
    outliers: tuple[SlowStep, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProfilerCost:
    """What profiling itself did to the step. `step_ms` is timed without it.

    Attributes:
        step_ms: Median step while operators were recorded.
        cost: `step_ms` over the undisturbed step, less one.
    """

    step_ms: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class TraceEvent:
    """Something that took time in one step.

    Attributes:
        track: "phase" (forward, backward, …), "host" (operators as the processor calls them),
            "device" (kernels), "data" (loading).
        start_ms: From the step's beginning.
        operator: Index in `ProfileResult.operators`; None where it is none of them.
    """

    name: str
    track: Track
    start_ms: float
    duration_ms: float
    operator: int | None = None
    phase: Phase | None = None
    lane: int = 0


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """What `suanli profile` found. Field meanings stand in docs/profile.md.

    Attributes:
        subject: "workload", "engine" or "run".
        training: Whether the step is one of training.
        categories: Parts of the step.
        operators: By time, the longest first.
        lost: From the measured step down to the speed of light; they add up to the difference.
        bound_by: What takes the most of the step.
        flops: Operations of a step, recomputation included.
        energy_j: Of one step; None where no counter can be read.
        trace: One step; the longest events where there are very many.
        untraced_ms: Time that no operator could be matched with; part of the categories.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    subject: Literal["workload", "engine", "run"]
    training: bool
    batch: int
    plan: Plan | TrainPlan
    step_ms: Estimate
    samples_per_s: float
    sol: SpeedOfLight | None
    verdict: str
    bound_by: BoundBy
    categories: StepTimes
    operators: tuple[OperatorProfile, ...]
    lost: tuple[LostTime, ...]
    advice: tuple[Advice, ...]
    memory: MemoryProfile | None
    stability: Stability
    profiler: ProfilerCost | None
    energy_j: float | None
    ceilings: tuple[Ceiling, ...]
    flops: int
    parameters: int
    seconds_spent: float
    trace: tuple[TraceEvent, ...] = ()
    untraced_ms: float = 0.0
    interrupted: bool = False
    notes: tuple[str, ...] = ()
