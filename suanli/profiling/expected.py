"""What a change is expected to give, from the measured step and the cost model's ratios."""

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceilings
from suanli.base.plan import Plan
from suanli.base.profile_results import StepTimes
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Operator
from suanli.cost.bound import operator_sol
from suanli.cost.changes import Manner, batch_ratios, cpu_ratios, gpu_ratios, scaled
from suanli.profiling.rows import Row

# Calls that are left of operators that can be fused, and what entering the fused code costs.
_CALLS_LEFT = {"none": 1.0, "compiled": 0.1, "engine": 0.05}
_ENTRY_MS = {"none": 0.0, "compiled": 0.04, "engine": 0.02}


def manner_of(plan: Plan | TrainPlan) -> Manner:
    """What the cost model needs to know of a plan."""
    last = plan.memory_layout == "channels_last"
    if isinstance(plan, TrainPlan):
        autocast = plan.precision in ("bf16", "fp16", "fp8") and plan.weights == "fp32"
        fused = "none" if plan.compile == "none" else "compiled"
        return Manner(
            precision=plan.precision,
            channels_last=last,
            fused=fused,  # type: ignore[arg-type]
            autocast=autocast,
            keeps_memory=plan.keep_memory,
        )
    by_backend = {"eager": "none", "inductor": "compiled", "aotinductor": "compiled"}
    return Manner(
        precision=plan.precision,
        channels_last=last or plan.backend not in by_backend,
        fused=by_backend.get(plan.backend, "engine"),  # type: ignore[arg-type]
        autocast=bool(plan.options.get("autocast")),
    )


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What an expectation is made from.

    Attributes:
        rows: The measured table.
        times: The measured parts of the step.
        ceilings: Of the device.
        sheet: Of the card; None on a CPU.
        plan: How it was measured.
        batch: Samples in the step.
    """

    rows: Sequence[Row]
    times: StepTimes
    ceilings: Ceilings
    plan: Plan | TrainPlan
    batch: int
    sheet: GpuSheet | None = None

    @property
    def step_ms(self) -> float:
        """The measured step."""
        return self.times.total_ms

    def ratios(self, operators: Sequence[Operator], new: Manner) -> list[float]:
        """Expected over present time of each operator under another manner."""
        old = manner_of(self.plan)
        if self.sheet is not None:
            return gpu_ratios(operators, old, new, self.sheet)
        return cpu_ratios(operators, old, new, self.ceilings)

    def step_with(self, plan: Plan | TrainPlan) -> float | None:
        """Expected milliseconds of the step under another plan; None where it cannot be said."""
        new = manner_of(plan)
        total = 0.0
        try:
            for row in self.rows:
                total += self._row_with(row, new)
        except BadInputError:
            return None
        idle = self.times.idle_ms * self._calls_left(new) / self._calls_left(manner_of(self.plan))
        idle = min(idle + _ENTRY_MS[new.fused], self.times.idle_ms + _ENTRY_MS[new.fused])
        rest = self.times.data_ms + self.times.transfer_ms + self.times.communication_ms
        return total + idle + rest

    def _calls_left(self, manner: Manner) -> float:
        """Calls of a step, those that a compiler or an engine fuses by their share."""
        left = 0.0
        for row in self.rows:
            products = any(op.matmul for op in row.operators)
            left += row.count * (1.0 if products else _CALLS_LEFT[manner.fused])
        return max(left, 1.0)

    def _row_with(self, row: Row, new: Manner) -> float:
        if not row.operators:  # a conversion or a copy that no model knows: it stays
            return row.ms
        ratio = _weighted(self.ratios(row.operators, new), row.operators)
        least = sum(self._least(op, new) for op in row.operators)
        return max(row.ms * ratio, min(least, row.ms))

    def _least(self, op: Operator, new: Manner) -> float:
        if new.fused != "none" and not op.matmul:
            return 0.0
        return operator_sol(op, self.ceilings, new.precision)[0]

    def step_at(self, batch: int) -> float | None:
        """Expected milliseconds at another batch; None where it cannot be said.

        What lies between operators stays, what computes and moves samples grows.
        """
        grown = batch / self.batch
        total = self.times.idle_ms
        try:
            for row in self.rows:
                total += row.ms * self._grown(row, grown)
        except BadInputError:  # products of a type that the device has no ceiling for
            return None
        return total + grown * (self.times.data_ms + self.times.transfer_ms)

    def _grown(self, row: Row, times: float) -> float:
        if not row.operators:
            return times
        if self.sheet is not None:
            before, after = (
                sum(self._least(op, manner_of(self.plan)) for op in operators) + _LAUNCH_MS
                for operators in (row.operators, [scaled(op, times) for op in row.operators])
            )
            return after / before
        ratios = batch_ratios(row.operators, manner_of(self.plan), self.ceilings, times)
        return _weighted(ratios, row.operators)


_LAUNCH_MS = 0.005  # of a kernel that does next to nothing


def _weighted(ratios: Sequence[float], operators: Sequence[Operator]) -> float:
    """The mean ratio, each operator counting for what it computes and moves."""
    weights = [max(1, op.flops + op.bytes_read + op.bytes_written) for op in operators]
    return sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)
