"""What a change is expected to give, from the measured step and the cost model's ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.hardware import Ceilings
from suanli.base.plan import Plan
from suanli.base.profile_results import StepTimes
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Operator
from suanli.cost.bound import operator_sol
from suanli.cost.changes import batch_ratios, cpu_ratios, gpu_ratios, scaled
from suanli.cost.cpu_manner import Fused, Manner, compiled_training_s
from suanli.profiling.rows import Row

# Calls that are left, of products and of operators that can be fused, and what entering the fused
# code costs: a compiler's code calls the library for products, an engine is one call.
_PRODUCTS_LEFT = {"none": 1.0, "compiled": 1.0, "engine": 0.05}
_CALLS_LEFT = {"none": 1.0, "compiled": 0.1, "engine": 0.05}
_ENTRY_MS = {"none": 0.0, "compiled": 0.1, "engine": 0.06}


_BY_BACKEND: dict[str, Fused] = {
    "eager": "none",
    "inductor": "compiled",
    "aotinductor": "compiled",
}


def manner_of(plan: Plan | TrainPlan) -> Manner:
    """What the cost model needs to know of a plan.

    On a CPU Inductor lays all images of a graph with convolutions out channels last, whatever the
    plan says (`decide_layout_opt` of torch 2.13); engines choose their layouts.
    """
    last = plan.memory_layout == "channels_last"
    if isinstance(plan, TrainPlan):
        autocast = plan.precision in ("bf16", "fp16", "fp8") and plan.weights == "fp32"
        compiled = plan.compile != "none"
        return Manner(
            precision=plan.precision,
            channels_last=last or (compiled and plan.kind == "cpu"),
            fused="compiled" if compiled else "none",
            autocast=autocast,
            keeps_memory=plan.keep_memory,
            training=True,
        )
    fused = _BY_BACKEND.get(plan.backend, "engine")
    laid_out = fused == "engine" or (fused == "compiled" and plan.device == "cpu")
    return Manner(
        precision=plan.precision,
        channels_last=last or laid_out,
        fused=fused,
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
        rest = self.times.data_ms + self.times.transfer_ms + self.times.communication_ms
        return total + self._idle_with(new) + self._one_by_one_ms(new) + rest

    def _one_by_one_ms(self, new: Manner) -> float:
        """What compiling a training step for a CPU adds to it."""
        was = manner_of(self.plan).fused
        if self.sheet is not None or not new.training or (was, new.fused) != ("none", "compiled"):
            return 0.0
        placed = (zip(row.indices, row.operators, strict=False) for row in self.rows)
        ordered = sorted(chain.from_iterable(placed), key=lambda item: item[0])
        return 1e3 * compiled_training_s([op for _, op in ordered], self.ceilings)

    def _idle_with(self, new: Manner) -> float:
        """Milliseconds between operators under another manner.

        In training it is autograd's and the loop's own more than that of calls, and stays.
        """
        old = manner_of(self.plan)
        left = 1.0
        if not new.training:
            left = min(1.0, self._calls_left(new) / self._calls_left(old))
        entry = _ENTRY_MS[new.fused] * (2 if new.training else 1)
        return self.times.idle_ms * left + (entry if new.fused != old.fused else 0.0)

    def _calls_left(self, manner: Manner) -> float:
        """Calls of a step, those that a compiler or an engine fuses by their share."""
        left = 0.0
        for row in self.rows:
            products = any(op.matmul for op in row.operators)
            left += row.count * (_PRODUCTS_LEFT if products else _CALLS_LEFT)[manner.fused]
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
