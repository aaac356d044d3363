"""Whether the workload's own metric survived, by a paired non-inferiority bound.

Each sample has two flags: right with the reference, right with the candidate. Only samples on which
the two differ tell anything: harmed (right before, wrong after) and helped (wrong before, right
after). The question is how large (harmed - helped) / n may be in truth, at 95 %.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from suanli.base.errors import BadInputError
from suanli.base.trial import ClassQuality, Quality

# Discordant samples from which the score bound is used.
_SCORE_FROM = 20
# How the error of the exact bound is shared between its two parts.
_HARM_SHARE = 0.9
# Added to the score statistic, in samples; see `upper_bound`.
_CONTINUITY = 0.5
_ALARM = 3.0
_MOST_SAMPLES = 100_000_000
_BLOCK_ROWS = 1024

Flags = NDArray[np.bool_]


def upper_bound(harmed: int, helped: int, n: int, *, confidence: float = 0.95) -> tuple[float, str]:
    """One-sided upper limit of the true drop p_harmed - p_helped, and the method that gave it.

    **"exact"**, under 20 discordant samples. With e = 1 - confidence: the Clopper-Pearson upper
    limit of p_harmed at 0.9 e minus the Clopper-Pearson lower limit of p_helped at 0.1 e; by the
    union bound it fails with probability e at most. Without any helped sample the lower limit is 0
    and the upper one takes all of e. That choice looks at the data, and still keeps the confidence:
    in the Poisson limit, with m = n p_helped, the bound fails with probability e at most where no
    helped sample was seen, and with 0.9 e at most where k were, unless the lower limit L(k) exceeds
    m. Such k add at most their probability times (L(k) - m) times the largest Poisson probability
    of the harmed count (0.23, as no failure is possible under a mean of 3); this stays under the
    0.1 e (1 - exp(-m)) that the first two leave, for every m. For finite n the tests enumerate all
    outcomes.

    **"score"**, from 20 on: Tango's score interval for the difference of paired proportions
    (Statistics in Medicine 17, 1998, 891-908), one-sided, with a continuity correction of half a
    sample. Without the correction its error reaches 5.6 % at n = 300 where 5 % is promised; with
    it, and the exact bound below 20, enumeration found 5.0 % at most.

    Args:
        harmed: Samples right before and wrong after.
        helped: Samples wrong before and right after.
        n: All samples.
        confidence: Of the one-sided limit.

    Raises:
        ValueError: The counts are negative or exceed n.
    """
    if harmed < 0 or helped < 0 or n < 0 or harmed + helped > n:
        raise ValueError(f"{harmed} harmed and {helped} helped do not fit {n} samples")
    if n == 0:
        return 1.0, "exact"
    error = 1 - confidence
    if harmed + helped >= _SCORE_FROM:
        return _score_upper(harmed, helped, n, error), "score"
    if helped == 0:
        return _binomial_upper(harmed, n, error), "exact"
    upper = _binomial_upper(harmed, n, error * _HARM_SHARE)
    return upper - _binomial_lower(helped, n, error * (1 - _HARM_SHARE)), "exact"


def _binomial_upper(k: int, n: int, error: float) -> float:
    """Clopper and Pearson (1934): the p at which P(X <= k) = error."""
    from scipy.special import betaincinv

    return 1.0 if k >= n else float(betaincinv(k + 1, n - k, 1 - error))


def _binomial_lower(k: int, n: int, error: float) -> float:
    """Clopper and Pearson (1934): the p at which P(X >= k) = error."""
    from scipy.special import betaincinv

    return 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, error))


def _score_upper(harmed: int, helped: int, n: int, error: float) -> float:
    """The drop at which the score statistic equals minus the normal quantile, by bisection."""
    from scipy.special import ndtri

    z = float(ndtri(1 - error))
    low, high = (harmed - helped) / n, 1.0
    for _ in range(60):
        drop = (low + high) / 2
        if _score(harmed, helped, n, drop) > -z:
            low = drop
        else:
            high = drop
    return high


def _score(harmed: int, helped: int, n: int, drop: float) -> float:
    """Tango's statistic: the variance takes p_helped's maximum-likelihood value under `drop`."""
    linear = -harmed - helped + (2 * n - harmed + helped) * drop
    constant = -helped * drop * (1 - drop)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    p_helped = (root - linear) / (4 * n)
    variance = n * (2 * p_helped + drop * (1 - drop))
    excess = harmed - helped - n * drop + _CONTINUITY
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess)


def samples_needed(
    budget: float, *, harmed: int = 0, helped: int = 0, n: int | None = None
) -> int | None:
    """Fewest samples with which the bound keeps within the budget.

    Args:
        budget: Largest drop accepted, as a fraction.
        harmed: Harmed samples seen.
        helped: Helped samples seen.
        n: Samples among which they were seen: the counts then grow in proportion. Without it they
            stay as they are: at 0.5 points 598 samples suffice with no harmed one, 947 with one.

    Returns:
        The number, or None where no number would do, because the rate of harm is over the budget.
    """
    if budget <= 0 or (n and (harmed - helped) / n >= budget):
        return None

    def certified(samples: int) -> bool:
        scale = samples / n if n else 1.0
        hurt, mended = math.ceil(harmed * scale - 1e-9), math.floor(helped * scale + 1e-9)
        if hurt + mended > samples:
            return False
        return upper_bound(hurt, mended, samples)[0] <= budget

    high = max(1, harmed + helped)
    while not certified(high):
        high *= 2
        if high > _MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certified(middle) else (middle, high)
    return high


def paired_quality(
    reference_ok: ArrayLike,
    candidate_ok: ArrayLike,
    *,
    budget: float,
    labels: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    metric: str = "accuracy",
) -> Quality:
    """Judge a candidate on samples that the search never saw.

    It is accepted when the 95 % upper limit of the drop is within the budget; with too few samples
    for that it is not, and `needed` says how many would do. Labels certify nothing where the
    reference is not clearly better than always answering the most frequent class: whoever is right
    by chance loses nothing by answering at random. Clearly means that the 95 % lower limit of its
    accuracy (Clopper-Pearson) is above that class's share.

    Args:
        reference_ok: Per sample, whether eager fp32 was right; [n].
        candidate_ok: Per sample, whether the candidate was; [n].
        budget: Largest drop accepted, as a fraction (0.005 is half a point).
        labels: Integer class per sample, [n], for recall per class.
        class_names: Name of each class; by default its number.
        metric: What "right" means, for the record.

    Raises:
        BadInputError: The lengths differ, or flags are not true or false.
    """
    before, after = _flags(reference_ok), _flags(candidate_ok)
    if before.shape != after.shape:
        raise BadInputError(f"{before.size} reference flags and {after.size} candidate flags")
    n = before.size
    harmed, helped = int((before & ~after).sum()), int((~before & after).sum())
    upper, method = upper_bound(harmed, helped, n)
    per_class = () if labels is None else _per_class(before, after, labels, class_names)
    majority = max(c.n for c in per_class) / n if per_class else None
    reason = "" if majority is None else _uninformed(int(before.sum()), n, majority)
    within = n > 0 and upper <= budget
    accepted = within and not reason
    return Quality(
        metric=metric,
        value=float(after.mean()) if n else 0.0,
        reference=float(before.mean()) if n else 0.0,
        drop_upper95=upper,
        budget=budget,
        n=n,
        accepted=accepted,
        harmed=harmed,
        helped=helped,
        needed=None if within else samples_needed(budget, harmed=harmed, helped=helped, n=n),
        method=method,
        per_class=per_class,
        alarms=tuple(c.label for c in per_class if c.drop > _ALARM * budget + 1e-12),
        majority=majority,
        reason=reason,
    )


def _uninformed(right: int, n: int, majority: float) -> str:
    """Why the reference's own accuracy makes the labels useless; "" if it does not."""
    lower = _binomial_lower(right, n, 0.05)
    if lower > majority:
        return ""
    return (
        f"the labels certify nothing: the reference is right on {right} of {n} samples (at least "
        f"{lower * 100:.1f} %), always answering the most frequent class on {majority * 100:.1f} %"
    )


def _flags(values: ArrayLike) -> Flags:
    flags = np.asarray(values)
    if flags.size == 0:
        return np.zeros(0, dtype=bool)
    if flags.ndim != 1 or flags.dtype.kind not in "biu" or not np.isin(flags, (0, 1)).all():
        raise BadInputError("one true or false per sample is needed")
    return flags.astype(bool)


def _per_class(
    before: Flags, after: Flags, labels: ArrayLike, class_names: Sequence[str] | None
) -> tuple[ClassQuality, ...]:
    """Recall of each class that occurs."""
    classes = _classes(labels, before.size)
    found = []
    for number in np.unique(classes):
        mine = classes == number
        named = class_names is not None and 0 <= number < len(class_names)
        found.append(
            ClassQuality(
                label=class_names[number] if named and class_names else str(number),
                n=int(mine.sum()),
                recall=float(after[mine].mean()),
                reference=float(before[mine].mean()),
            )
        )
    return tuple(found)


def _classes(labels: ArrayLike, n: int) -> NDArray[Any]:
    classes = np.asarray(labels)
    if classes.shape != (n,) or classes.dtype.kind not in "iu":
        raise BadInputError(
            f"labels must be {n} integers, not {classes.dtype} of shape {classes.shape}"
        )
    return classes


def accuracy_ok(outputs: ArrayLike, labels: ArrayLike) -> Flags:
    """Whether each sample's class is right; [n].

    Args:
        outputs: Scores [n, classes], of which the largest decides, or integer classes [n]. A row
            with NaN or infinity is wrong.
        labels: Integer classes [n].

    Raises:
        BadInputError: The shapes do not fit, or the outputs are neither.
    """
    scores = np.asarray(outputs)
    if scores.ndim == 1 and scores.dtype.kind in "iu":
        return np.asarray(scores == _classes(labels, scores.size))
    if scores.ndim != 2 or scores.shape[1] < 2 or scores.dtype.kind not in "fiu":
        raise BadInputError(
            f"accuracy needs scores [n, classes], not {scores.dtype} of shape {scores.shape}"
        )
    right = scores.argmax(axis=1) == _classes(labels, len(scores))
    return np.asarray(right & np.isfinite(scores).all(axis=1))


def cosine(candidate: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Cosine of each pair of rows; [n]. 0 where a row is zero or not finite.

    Args:
        candidate: [n, d].
        reference: [n, d].

    Raises:
        BadInputError: The shapes differ or are not [n, d].
    """
    mine, theirs = _rows(candidate), _rows(reference)
    if mine.shape != theirs.shape:
        raise BadInputError(f"embeddings of shapes {mine.shape} and {theirs.shape}")
    return np.asarray((mine * theirs).sum(axis=1))


def ranking_agreement_ok(
    embeddings: ArrayLike, reference_embeddings: ArrayLike, *, tie: float = 1e-3
) -> Flags:
    """Whether each sample's nearest other sample, by cosine, is still the reference's; [n].

    The reference itself is right everywhere by definition, so `paired_quality` takes all true flags
    for it.

    Args:
        embeddings: The candidate's, [n, d]; a row that is zero or not finite is wrong.
        reference_embeddings: The reference's, [n, d].
        tie: Another neighbour is as good where the reference puts its cosine this close to the
            best; such an order is within what rounding decides.

    Raises:
        BadInputError: The shapes differ, or there are fewer than two samples.
    """
    mine, theirs = _rows(embeddings), _rows(reference_embeddings)
    if mine.shape != theirs.shape or len(mine) < 2:
        raise BadInputError(f"embeddings of shapes {mine.shape} and {theirs.shape}")
    agree = np.zeros(len(mine), dtype=bool)
    for start in range(0, len(mine), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(mine)))
        chosen = _similarity(mine, rows).argmax(axis=1)
        similarity = _similarity(theirs, rows)
        best = similarity.max(axis=1)
        agree[rows] = similarity[np.arange(len(rows)), chosen] >= best - tie
    return np.asarray(agree & (np.abs(mine).sum(axis=1) > 0))


def _similarity(unit_rows: NDArray[np.float64], rows: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of the chosen rows with all rows, themselves left out; [len(rows), n]."""
    similarity = unit_rows[rows] @ unit_rows.T
    similarity[np.arange(len(rows)), rows] = -np.inf
    return np.asarray(similarity)


def _rows(values: ArrayLike) -> NDArray[np.float64]:
    """Rows of length one; zero where a row is zero or not finite."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise BadInputError(f"embeddings must be [n, d], not of shape {rows.shape}")
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))
