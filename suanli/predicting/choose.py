"""Which card to take for a job: all catalogued ones by time, money and energy."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from suanli.base import units
from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.predict_results import Excluded, Prediction, Ranked
from suanli.cost.gpu_rates import peak_flops
from suanli.devices import slug
from suanli.predicting.ask import Ask
from suanli.predicting.measured import as_measured
from suanli.predicting.one import predict_on
from suanli.predicting.prices import Prices
from suanli.predicting.subject import Subject

_MOST_SAMPLES = 10**18
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", re.IGNORECASE)
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a card must keep to be chosen.

    Attributes:
        samples: Samples of the whole job.
        max_cost: Money for the job.
        deadline_s: Seconds for the job.
        max_power_w: Power limit of one card.
    """

    samples: int = 1_000_000
    max_cost: float | None = None
    deadline_s: float | None = None
    max_power_w: float | None = None

    def checked(self, prices: Prices | None) -> "Limits":
        """These limits.

        Raises:
            BadInputError: One makes no sense.
        """
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise BadInputError(f"--samples must be from 1 to {_MOST_SAMPLES:g}")
        for name, value in (("--max-cost", self.max_cost), ("--max-power", self.max_power_w)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise BadInputError(f"{name} must be more than 0, not {value:g}")
        if self.max_cost is not None and prices is None:
            raise BadInputError("--max-cost needs prices", next_step="give --prices FILE")
        return self


def parse_time(text: str) -> float:
    """Seconds of "90", "90s", "30m", "2h" or "3d".

    Raises:
        BadInputError: It is no such time.
    """
    found = _TIME.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[(found[2] or "s").lower()] if found else 0.0
    if not seconds > 0:
        raise BadInputError(f"no time {text!r}", next_step="write 90s, 30m, 2h or 3d")
    return seconds


def rank(
    subject: Subject,
    sheets: Sequence[GpuSheet],
    ask: Ask,
    limits: Limits,
    *,
    prices: Prices | None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[Ranked, ...], tuple[Excluded, ...]]:
    """All cards that can do the job within the limits, best first, and those that are out.

    With prices the cheapest comes first, else the fastest; `pareto` marks those that no other one
    beats.

    Args:
        subject: The workload, captured.
        sheets: The cards.
        ask: How it is to run on each.
        limits: What is asked of a card.
        prices: By the hour; a card without one is ranked last.
        say: Told what is going on.

    Raises:
        BadInputError: What is asked can be done on no card, whichever it is.
    """
    kept: list[Ranked] = []
    out: list[Excluded] = []
    tried, refused = 0, list[BadInputError]()
    for index, sheet in enumerate(sheets):
        name = slug(sheet)
        say(f"{index + 1} of {len(sheets)}: {name}")
        reason = _lacks(sheet, ask, limits)
        if not reason:
            tried += 1
            try:
                found = predict_on(subject, as_measured(sheet), ask, prices=prices)
            except BadInputError as error:
                reason = str(error)
                refused += [] if _about(sheet, error) else [error]
                if refused and ask.devices == 1:
                    raise  # no card can do it: the same line for each would say nothing
            else:
                entry = _job(found, limits)
                reason = _beyond(entry, limits)
                if not reason:
                    kept.append(entry)
        if reason:
            out.append(Excluded(gpu=name, reason=reason))
    if tried and len(refused) == tried:
        raise refused[0]
    marked = [replace(entry, pareto=not _beaten(entry, kept)) for entry in kept]
    return tuple(sorted(marked, key=_order)), tuple(out)


def _about(sheet: GpuSheet, error: BadInputError) -> bool:
    return sheet.name in str(error)


# The first compute capability with fast products of a type: tensor units, and before them the dot
# products of four bytes (NVIDIA, "CUDA C++ Programming Guide").
_SINCE = {"fp16": 7.0, "bf16": 8.0, "tf32": 8.0, "int8": 6.1, "fp8": 8.9}


def _lacks(sheet: GpuSheet, ask: Ask, limits: Limits) -> str:
    try:
        peak_flops(sheet, ask.dtype)
    except BadInputError:
        has_units = float(sheet.compute_capability) >= _SINCE.get(ask.dtype, 0.0)
        return f"its {ask.dtype} rate is unknown" if has_units else f"no {ask.dtype}"
    if limits.max_power_w is not None:
        if sheet.power_w is None:
            return "its power is unknown"
        if sheet.power_w > limits.max_power_w:
            return f"power: {sheet.power_w:g} W, {limits.max_power_w:g} W allowed"
    return ""


def _job(found: Prediction, limits: Limits) -> Ranked:
    values = {item.name: getattr(found, item.name) for item in fields(Prediction)}
    job_s = limits.samples / found.samples_per_s
    return Ranked(
        **values,
        job_s=job_s,
        job_cost=None if found.cost is None else found.cost.per_hour * job_s / 3600.0,
        job_energy_j=None
        if found.energy_j is None
        else found.energy_j / found.batch * limits.samples,
        pareto=False,
    )


def _beyond(entry: Ranked, limits: Limits) -> str:
    """Why an entry is out, or ""."""
    if not entry.fits:
        need, have = units.size(entry.memory.total_bytes), units.size(entry.usable_bytes)
        return f"memory: {need} needed, {have} there"
    if limits.deadline_s is not None and entry.job_s > limits.deadline_s:
        return f"time: {_span(entry.job_s)}, {_span(limits.deadline_s)} allowed"
    if limits.max_cost is not None:
        if entry.job_cost is None:
            return "it has no price"
        if entry.job_cost > limits.max_cost:
            return f"cost: {entry.job_cost:.2f}, {limits.max_cost:.2f} allowed"
    return ""


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _axes(entry: Ranked) -> tuple[float | None, ...]:
    return entry.job_s, entry.job_cost, entry.job_energy_j


def _beaten(entry: Ranked, others: Sequence[Ranked]) -> bool:
    """Whether another is no worse in all that is known of both, and better in something."""
    for other in others:
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(_axes(entry), _axes(other), strict=True)
            if mine is not None and theirs is not None
        ]
        unknown = any(
            mine is not None and theirs is None
            for mine, theirs in zip(_axes(entry), _axes(other), strict=True)
        )
        no_worse = all(theirs <= mine for mine, theirs in pairs)
        if no_worse and not unknown and any(theirs < mine for mine, theirs in pairs):
            return True
    return False


def _order(entry: Ranked) -> tuple[float, float]:
    cost = math.inf if entry.job_cost is None else entry.job_cost
    return cost, entry.job_s
