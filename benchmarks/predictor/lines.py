"""Lines of the table of errors: made from errors, judged by intervals, printed."""

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_NINETY = 1.645
# An eighth decile of so many medians is that of two kinds of errors (1.9 in a normal distribution).
_TWO_KINDS = 4.0
# Of each line of this run: errors, and the spreads that judged them.
_JUDGED: dict[tuple[str, str], tuple[Any, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Attributes:
        data: The set, as the table of targets names it.
        target: Median absolute error to reach.
        case: What was left out.
        rows: How many measurements.
        error: Median of |predicted / measured - 1|.
        bias: Median of predicted / measured.
        coverage: Part of the measurements inside the 90 % interval.
        reach: Ninth decile of |log(predicted / measured)|.
        most: Eighth decile of it.
        wider: Standard deviation that the cards' distance and the host add to the kind's own.
        kind: Which spread of the parameter file its interval rests on.
        beside: Name -> median absolute error of a simpler rule.
        published: Errors that the data's own authors state for their predictor there.
    """

    data: str
    target: float
    case: str
    rows: int
    error: float
    bias: float
    coverage: float
    reach: float
    most: float
    wider: float
    kind: str
    beside: dict[str, float] = field(default_factory=dict)
    published: str = ""


def line(
    name: str,
    target: float,
    case: str,
    errors: Any,
    spread: Any,
    beside: dict[str, Any],
    kind: str = "transfer",
    own: float | None = None,
) -> Line:
    """From log errors to a line; `beside` holds log errors too, `own` is the kind's spread."""
    errors = np.asarray(errors, dtype=float)
    _JUDGED[name, case] = errors, np.broadcast_to(np.asarray(spread, dtype=float), errors.shape)
    return Line(
        data=name,
        target=target,
        case=case,
        rows=len(errors),
        error=median_error(errors),
        bias=float(np.exp(np.median(errors))),
        coverage=float(np.mean(np.abs(errors) <= _NINETY * np.asarray(spread))),
        reach=float(np.quantile(np.abs(errors), 0.9)),
        most=float(np.quantile(np.abs(errors), 0.8)),
        wider=_beyond(spread, own),
        kind=kind,
        beside={key: median_error(value) for key, value in beside.items()},
    )


def median_error(logs: Any) -> float:
    """Median of |ratio - 1|."""
    return float(np.median(np.abs(np.exp(np.asarray(logs, dtype=float)) - 1.0)))


def _beyond(spread: Any, own: float | None) -> float:
    """Root mean square of what spreads hold beyond the kind's own."""
    if own is None:
        return 0.0
    return float(np.sqrt(np.mean(np.maximum(np.asarray(spread, dtype=float) ** 2 - own**2, 0.0))))


def calibrated(lines: list[Line], before: dict[str, Any]) -> dict[str, Any]:
    """Spreads that hold nine of ten left-out measurements, each line counting alike.

    No line may fall under four in five, but for those whose errors are of two kinds, which no
    width of one distribution fits.
    """
    after = dict(before)
    for kind in ("base", "operator", "transfer", "collective", "power"):
        mine = [x for x in lines if x.kind == kind]
        if not mine:
            continue
        nine = [_needed(x, before[kind], 0.9) for x in mine]
        four = [_needed(x, before[kind], 0.8) for x in mine if x.most < _TWO_KINDS * x.error]
        square = max(statistics.fmean(nine), max(four, default=0.0))
        after[kind] = float(f"{math.sqrt(square) + 0.004:.2g}")
    return after


def _needed(found: Line, before: float, part: float) -> float:
    """Square of the kind's own spread that holds this part of a line.

    Each measurement has its own host and card, so that what these add is taken off one by one; of
    a line of an older run the mean is.
    """
    if (found.data, found.case) not in _JUDGED:
        size = found.reach if part > 0.85 else found.most
        return max((size / _NINETY) ** 2 - found.wider**2, 0.0)
    errors, spread = _JUDGED[found.data, found.case]
    beyond = np.maximum(spread**2 - before**2, 0.0)
    return max(float(np.quantile((errors / _NINETY) ** 2 - beyond, part)), 0.0)


def judged_anew(found: Line, before: dict[str, float], after: dict[str, float]) -> Line:
    """A line of this run with its coverage under other spreads; the line itself if it is older."""
    if (found.data, found.case) not in _JUDGED:
        return found
    kind = "base" if found.kind == "doubling" else found.kind
    errors, spread = _JUDGED[found.data, found.case]
    spread = np.sqrt(np.maximum(spread**2 - before[kind] ** 2, 0.0) + after[kind] ** 2)
    return replace(found, coverage=float(np.mean(np.abs(errors) <= _NINETY * spread)))


def summary(lines: list[Line]) -> str:
    """One row per set: the mean over what was left out."""
    head = (
        "| data | lines | mean of the median errors | target | mean coverage |\n"
        "|---|---|---|---|---|\n"
    )
    rows = []
    for name in dict.fromkeys(x.data for x in lines):
        mine = [x for x in lines if x.data == name]
        error = statistics.fmean(x.error for x in mine)
        mark = "" if error <= mine[0].target else " (missed)"
        rows.append(
            f"| {name} | {len(mine)} | {100 * error:.1f} % | {100 * mine[0].target:.0f} %{mark} | "
            f"{100 * statistics.fmean(x.coverage for x in mine):.0f} % |"
        )
    return head + "\n".join(rows) + "\n"


def markdown(lines: list[Line]) -> str:
    """The table as people read it."""
    head = (
        "| data | left out | rows | median error | target | bias | in 90 % interval | beside | "
        "stated by the authors |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for x in lines:
        beside = ", ".join(f"{k} {100 * v:.0f} %" for k, v in x.beside.items() if not math.isnan(v))
        mark = "" if x.error <= x.target else " (missed)"
        rows.append(
            f"| {x.data} | {x.case} | {x.rows} | {100 * x.error:.1f} % | "
            f"{100 * x.target:.0f} %{mark} | {x.bias:.2f} | {100 * x.coverage:.0f} % | {beside} | "
            f"{x.published} |"
        )
    return head + "\n".join(rows) + "\n"
