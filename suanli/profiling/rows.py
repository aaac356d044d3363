"""From joined calls to the table of a profile: one row per operator, module and line."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceilings
from suanli.base.profile_results import OperatorProfile
from suanli.base.work import BoundBy, Operator, Phase
from suanli.cost.bound import operator_sol
from suanli.profiling.joining import Joined

# Bytes of an element over those of fp32.
_WIDTHS = {"bf16": 0.5, "fp16": 0.5, "int8": 0.25}
# Calls under so many milliseconds are mostly their own overhead.
TINY_MS = 0.03
_Key = tuple[Phase, str, str, str]


@dataclass(kw_only=True)
class Row:
    """The calls that make one row.

    Attributes:
        operators: What was counted of them, call by call.
        ms: Time of all of them in a step.
        fused: Names of what ran as one; empty where each ran by itself.
        kernel: What the library calls it.
        indices: Positions of `operators` in the counted list.
    """

    name: str
    phase: Phase
    module: str = ""
    source: str = ""
    count: int = 0
    ms: float = 0.0
    operators: list[Operator] = field(default_factory=list)
    fused: tuple[str, ...] = ()
    kernel: str = ""
    precision: str = ""
    indices: list[int] = field(default_factory=list)


def grouped(steps: Sequence[Sequence[Joined]]) -> list[Row]:
    """Rows of the usual step; the time of each is the median over the recorded steps.

    Args:
        steps: Joined calls of each recorded step; at least one step.
    """
    tables = [_table(step) for step in steps]
    first = max(tables, key=len)
    rows = []
    for key, row in first.items():
        times = [table[key].ms for table in tables if key in table]
        row.ms = median(times) if len(times) * 2 > len(tables) else 0.0
        if row.ms > 0:
            rows.append(row)
    return rows


def _table(step: Sequence[Joined]) -> dict[_Key, Row]:
    table: dict[_Key, Row] = {}
    for joined in step:
        op = joined.operator
        name = op.name if op is not None else joined.node.name.rpartition("::")[2].rstrip("_")
        key = (joined.phase, name, joined.module, joined.source)
        if joined.phase == "optimizer":  # one row in the end, whose calls may differ by step
            key = (joined.phase, "", "", "")
        row = table.get(key)
        if row is None:
            row = Row(name=name, phase=joined.phase, module=joined.module, source=joined.source)
            row.kernel = joined.node.kernels[0] if joined.node.kernels else ""
            table[key] = row
        row.count += 1
        row.ms += joined.ms
        if op is not None:
            every = sorted([(joined.index, op), *joined.beside], key=lambda item: item[0])
            row.operators += [operator for _, operator in every]
            row.indices += [index for index, _ in every]
            if joined.beside:
                row.fused = tuple(dict.fromkeys(operator.name for _, operator in every))
    return table


def fitted(rows: Sequence[Row], phase: Phase, limit_ms: float) -> float:
    """Milliseconds of a phase's rows, which are scaled down where they exceed the phase itself.

    What profiling adds cannot be taken out to the last microsecond: what is left of it may not
    make an operator longer than the part of the step that it ran in.
    """
    mine = [row for row in rows if row.phase == phase]
    total = sum(row.ms for row in mine)
    if total > limit_ms > 0:
        for row in mine:
            row.ms *= limit_ms / total
        return limit_ms
    return total


def within(rows: Sequence[Row], busy: dict[Phase, float], limit_ms: float) -> None:
    """Scale all rows and the sums by phase down until they fit into so much time together."""
    total = sum(busy.values())
    if total <= limit_ms or total <= 0:
        return
    for row in rows:
        row.ms *= limit_ms / total
    for phase in busy:
        busy[phase] *= limit_ms / total


def finished(
    rows: Sequence[Row], *, step_ms: float, ceilings: Ceilings | None, precision: str
) -> list[OperatorProfile]:
    """Rows with their rates and limits, the longest first.

    Args:
        rows: Of the step.
        step_ms: The step.
        ceilings: Of the device; None where they are not known.
        precision: What the plan's products run in, for "tf32" and for what is quantised.
    """
    found = [_finished(row, step_ms, ceilings, precision) for row in rows]
    return sorted(found, key=lambda row: -row.time_ms)


def _finished(
    row: Row, step_ms: float, ceilings: Ceilings | None, precision: str
) -> OperatorProfile:
    operators = row.operators
    flops = sum(op.flops for op in operators)
    if row.fused:
        operators = [as_one(operators, row.precision)]
    moved = sum(op.bytes_read + op.bytes_written for op in operators)
    sol, bound_by = limit_of(operators, ceilings, row.precision or precision)
    if ceilings is not None and operators and not row.fused:
        call_ms = 1e3 * ceilings.overhead_s()
        if sol is not None and call_ms * row.count > sol and row.ms < TINY_MS * row.count:
            bound_by = "overhead"
    seconds = 1e-3 * row.ms
    return OperatorProfile(
        name=row.name,
        module=row.module,
        source=row.source,
        count=row.count,
        time_ms=row.ms,
        flops=flops,
        bytes=moved,
        bound_by=bound_by,
        sol_ms=sol,
        phase=row.phase,
        dtype=row.precision or (operators[0].dtype if operators else ""),
        intensity=flops / moved if moved else None,
        flops_per_s=flops / seconds if flops and seconds else None,
        bytes_per_s=moved / seconds if moved and seconds else None,
        lost_ms=None if sol is None else max(0.0, row.ms - sol),
        share=row.ms / step_ms if step_ms else 0.0,
        fused=row.fused,
        kernel=row.kernel,
    )


def limit_of(
    operators: Sequence[Operator], ceilings: Ceilings | None, precision: str
) -> tuple[float | None, BoundBy]:
    """Least milliseconds of these operators one after the other, and what binds most of that."""
    if ceilings is None:
        return None, "compute" if any(op.matmul for op in operators) else "memory"
    total = 0.0
    parts: dict[BoundBy, float] = {"memory": 0.0, "compute": 0.0}
    for op in operators:
        try:
            ms, bound_by = operator_sol(op, ceilings, _runs_in(op, precision))
        except BadInputError:  # an integer type has no products
            ms, bound_by = operator_sol(replace(op, matmul=False), ceilings, "fp32")
        parts[bound_by] += ms
        total += ms
    return total, max(parts, key=lambda name: parts[name])


def _runs_in(op: Operator, precision: str) -> str:
    """The precision that an operator may use: its own type's, or a way to multiply that type."""
    if precision in ("tf32", "int8", "fp8") or op.dtype not in ("fp32", "bf16", "fp16"):
        return precision
    return op.dtype


def as_one(operators: Sequence[Operator], precision: str) -> Operator:
    """The operator that reads what these read from outside, and writes what the last one writes.

    What passes between them stays in registers or caches. Which inputs come from outside is not
    recorded: the largest reader's are taken, and the parameters of all.
    """
    main = max(operators, key=lambda op: (op.matmul, op.flops, op.bytes_read))
    parameters = sum(op.parameter_bytes for op in operators)
    needed = sum(op.least_flops for op in operators if op.matmul)
    return replace(
        main,
        dtype=precision
        if precision in ("bf16", "fp16", "int8") and main.dtype == "fp32"
        else main.dtype,
        flops=sum(op.flops for op in operators),
        needed_flops=needed or None,
        bytes_read=_narrow(main.bytes_read - main.parameter_bytes + parameters, main, precision),
        bytes_written=_narrow(operators[-1].bytes_written, main, precision),
    )


def _narrow(size: int, op: Operator, precision: str) -> int:
    return int(size * (_WIDTHS.get(precision, 1.0) if op.dtype == "fp32" else 1.0))
