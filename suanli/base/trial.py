"""One plan tried, and what was found about its answer."""

from dataclasses import dataclass, field
from typing import Literal

from suanli.base.plan import Plan
from suanli.base.timing import Estimate, Timing

Status = Literal["verified", "rejected", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """Error of one output against the float64 reference, beside eager's own at that precision.

    All figures are over the whole output, in the output's unit. `ratio` figures are candidate over
    the allowance that eager earns, so that 1.0 is exactly at the limit times 1/k.

    Attributes:
        rms: Root of the mean squared error.
        eager_rms: The same of eager at the plan's precision.
        bias_ratio: Largest per-channel mean signed error over its allowance.
        gain_ratio: Largest per-channel relative slope error over its allowance.
        worst_channel: Channel or class at which the bias or gain is largest; None without channels.
        relative_rms: `rms` over the root mean square of the reference; for integers the share of
            elements that differ.
        eager_relative_rms: The same of eager at the plan's precision.
    """

    name: str
    rms: float
    eager_rms: float
    max_abs: float
    eager_max_abs: float
    rms_ratio: float
    max_ratio: float
    bias_ratio: float
    gain_ratio: float
    worst_channel: int | None = None
    relative_rms: float = 0.0
    eager_relative_rms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ValueCheck:
    """Whether the values of a floating-point plan are as right as eager's.

    Attributes:
        k: How many times eager's own error is allowed.
        batches: Batch sizes at which it was checked.
        reason: Why not, "" if ok.
        relative_rms: Largest `relative_rms` of its outputs; None where none was compared.
    """

    ok: bool
    k: float
    outputs: tuple[OutputError, ...] = ()
    batches: tuple[int, ...] = ()
    reason: str = ""
    relative_rms: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """One class of a classifier: recall before and after, over `n` samples."""

    label: str
    n: int
    recall: float
    reference: float

    @property
    def drop(self) -> float:
        """How much recall was lost, as a fraction."""
        return self.reference - self.recall


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The workload's own metric on samples that the search never saw.

    Attributes:
        metric: "accuracy", "cosine", "ranking_agreement", …
        value: Of the plan, as a fraction.
        reference: Of eager fp32, as a fraction.
        drop_upper95: 95 % upper limit of (harmed - helped) / n, as a fraction.
        budget: The largest drop that is accepted, as a fraction.
        n: Samples used for acceptance.
        harmed: Samples right before and wrong after.
        helped: Samples wrong before and right after.
        needed: Samples that would certify the budget at this rate of harm; None if enough.
        method: "exact" or "score".
        alarms: Classes that lost more than three times the budget.
        majority: Share of the most frequent class, which always answering it would get right; None
            without classes.
        reason: Why these labels can certify nothing, whatever the drop; "" if they can.
        batch: Batch size at which the plan answered.
    """

    metric: str
    value: float
    reference: float
    drop_upper95: float
    budget: float
    n: int
    accepted: bool
    harmed: int = 0
    helped: int = 0
    needed: int | None = None
    method: str = "exact"
    per_class: tuple[ClassQuality, ...] = ()
    alarms: tuple[str, ...] = ()
    majority: float | None = None
    reason: str = ""
    batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan tried. Failures are data.

    Attributes:
        status: "verified", "rejected" (ran, but wrong or worse), "failed" or "skipped".
        reason: One line; "" for a verified one.
        step_ms: Milliseconds for one batch; None where it never ran.
        samples_per_s: None where it never ran.
        seconds_spent: Wall time of building, timing and verifying.
        baseline: Whether this is a plan that a person has without Suanli.
        build_dir: Folder with what was built, relative to the search's own; "" where nothing is.
        peak_bytes: Largest resident size of the trial's process group.
        batch: Samples in the step that was timed.
        resumed: Whether it comes from the store of an earlier search.
        timings: Step times at the other batch sizes that the engine is held to.
        details: Short facts of the backend's build.
    """

    plan: Plan
    status: Status
    reason: str = ""
    step_ms: Estimate | None = None
    samples_per_s: float | None = None
    quality: Quality | None = None
    values: ValueCheck | None = None
    seconds_spent: float = 0.0
    baseline: bool = False
    batch: int = 1
    peak_bytes: int | None = None
    build_dir: str = ""
    resumed: bool = False
    timings: tuple[Timing, ...] = ()
    details: dict[str, str] = field(default_factory=dict)
