"""Which trials may become the engine, and which of its plans serves which batch size."""

from collections.abc import Sequence
from dataclasses import replace

from suanli.base.trial import Quality, Trial
from suanli.plans.search import SearchResult

_FINALISTS = 4


def finalists(found: SearchResult, trials: Sequence[Trial]) -> list[Trial]:
    """The winner, those behind it, and eager fp32 as exported, the last resort."""
    assert found.winner is not None
    ordered = [shippable(trial) for trial in (found.winner, *found.runner_ups)]
    eager = next((trial for trial in trials if trial.baseline and trial.status == "verified"), None)
    distinct: dict[str, Trial] = {}
    for trial in ordered:
        distinct.setdefault(trial.plan.key, trial)
    best = list(distinct.values())[:_FINALISTS]
    floats = [trial for trial in distinct.values() if not trial.plan.quantized][:2]
    last = [*best, *floats, *([shippable(eager)] if eager is not None else [])]
    return list({trial.plan.key: trial for trial in last}.values())


def shippable(trial: Trial) -> Trial:
    """The same plan on the exported program, for one that runs the user's own module.

    It is built, verified and raced like any other finalist before anything is said of it.
    """
    if not trial.plan.options.get("source"):
        return trial
    options = {name: value for name, value in trial.plan.options.items() if name != "source"}
    return replace(trial, plan=trial.plan.with_(options=options), build_dir="", baseline=False)


def baseline_caveats(trials: Sequence[Trial]) -> list[str]:
    """What to know of the best baseline: those never measured, and faster ones that were wrong."""
    notes = []
    baselines = [trial for trial in trials if trial.baseline]
    if missing := [t for t in baselines if t.status in ("skipped", "failed")]:
        named = "; ".join(f"{trial.plan.title}: {trial.reason}" for trial in missing)
        notes.append(f"the best baseline is the best of those measured; not among them {named}")
    right = [t.step_ms.p50 for t in baselines if t.status == "verified" and t.step_ms]
    for trial in baselines:
        if trial.status != "rejected" or trial.step_ms is None:
            continue
        if right and trial.step_ms.p50 < min(right):
            notes.append(
                f"{trial.plan.title}, at {trial.step_ms.p50:.3g} ms faster than the best baseline, "
                "was rejected for its values and is not compared with"
            )
    return notes


def distinct_variants(serving: dict[int, Trial]) -> tuple[list[Trial], dict[int, int]]:
    """The distinct trials that serve, and batch size -> index among them."""
    variants: list[Trial] = []
    for trial in serving.values():
        if trial not in variants:
            variants.append(trial)
    return variants, {batch: variants.index(trial) for batch, trial in serving.items()}


def batch_ranges(variant_of: dict[int, int], max_batch: int) -> list[tuple[int, int, int]]:
    """(first batch, last batch, variant) without gaps from 1 to `max_batch`.

    A batch between two that were measured goes to the variant of the larger one.
    """
    ranges: list[tuple[int, int, int]] = []
    first = 1
    for batch in sorted(variant_of):
        variant = variant_of[batch]
        if ranges and ranges[-1][2] == variant:
            ranges[-1] = (ranges[-1][0], batch, variant)
        else:
            ranges.append((first, batch, variant))
        first = batch + 1
    start, _, variant = ranges[-1]
    ranges[-1] = (start, max(max_batch, start), variant)
    return ranges


def refusal(quality: Quality) -> str:
    """Why a quantised plan is not accepted, and how many samples would certify it."""
    if quality.reason:
        return quality.reason
    bound = f"{quality.drop_upper95 * 100:.2f} points (95 %)"
    where = f" at batch {quality.batch}" if quality.batch is not None else ""
    text = f"may lose up to {bound}{where}, {quality.budget * 100:.2f} are allowed"
    if quality.needed is not None and quality.needed > quality.n:
        text += f"; to certify it {quality.needed} acceptance samples are needed, not {quality.n}"
    return text
