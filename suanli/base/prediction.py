"""What the predictor says of a step on a device that was not measured."""

from dataclasses import dataclass
from typing import Literal

from suanli.base.work import BoundBy, Phase

PlanKind = Literal["eager", "compiled"]
KernelKind = Literal[
    "product", "convolution", "attention", "recurrent", "rows", "pointwise", "update", "free"
]
Collective = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"
]


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """One operator's share of a predicted step.

    Attributes:
        name: As in `Operator.name`.
        kind: The family of kernels that it was taken for; "rows" are softmax, norms, reductions.
        ms: Time on the device, launches left out.
        launches: Kernels that it starts.
        bound_by: Which of its own terms is the largest.
    """

    name: str
    kind: KernelKind
    phase: Phase
    ms: float
    launches: float
    bound_by: BoundBy


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A prediction in milliseconds: the median and the 90 % interval."""

    p50: float
    lo90: float
    hi90: float


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """One step on one device.

    Attributes:
        step_ms: The step's time.
        bound_by: What takes the most of it.
        compute_ms: Device time of the operators bound by arithmetic.
        memory_ms: Device time of the operators bound by bytes.
        overhead_ms: What launches and the host add to the device's time.
        communication_ms: What transfers between devices add; 0 on one device.
        sol_ms: The least time that the sheet's figures allow for the same operators.
        operators: Time of each, in the order of the work.
        spread: Standard deviation of the logarithm of measured over predicted time.
        widened: Why the interval is wider than on a device that was fitted, one line each.
        power_w: Mean power of one device, and its 90 % interval; None where the sheet has no limit.
        energy_j: Of one step on all devices; None likewise.
        idle_share: Part of the step in which the device waits for the host or for others.
    """

    step_ms: Interval
    bound_by: BoundBy
    compute_ms: float
    memory_ms: float
    overhead_ms: float
    sol_ms: float
    operators: tuple[OperatorTime, ...]
    spread: float
    communication_ms: float = 0.0
    widened: tuple[str, ...] = ()
    power_w: float | None = None
    energy_j: float | None = None
    idle_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins a group of devices.

    Attributes:
        kind: "nvlink" through switches, "nvlink_mesh" from card to card without (before compute
            capability 8.0), "pcie" or "network".
        bytes_per_s: One direction of one device, as the maker states it.
        devices: How many it can join.
    """

    kind: Literal["nvlink", "nvlink_mesh", "pcie", "network"]
    bytes_per_s: float
    devices: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How a step is spread over devices; their number is dp * tp * pp.

    Attributes:
        dp: Replicas that share the batch.
        tp: Devices that share each matrix product.
        pp: Stages, each with a run of layers.
        micro_batches: Parts into which a replica's batch is cut, one after the other through the
            stages, or accumulated where there is one stage.
        sharded: Whether replicas keep a part of parameters, gradients and optimiser states each
            (ZeRO stage 3, "fully sharded") and gather parameters when they are needed.
        recompute: Whether the backward pass computes the forward pass anew.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1
    sharded: bool = False
    recompute: bool = False

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.dp * self.tp * self.pp
