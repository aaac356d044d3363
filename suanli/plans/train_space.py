"""The legal training plans of a situation, each with what it is expected to give and to cost.

They are candidates of the same search that inference uses: baselines are what a person's loop does,
a coarse plan stands for each family (backend and precision), and variations differ from it in one
decision.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan, TrainPrecision
from suanli.plans.situation import Situation, why_not_precision
from suanli.plans.space import Candidate

# Expected step relative to plain eager fp32, for ordering only; the search learns the real ones.
# bf16 on matrix units and the kept memory were 0.23 and 0.75 for a convolutional net on two cores.
_PROMISE = {"fp32": 1.0, "tf32": 0.5, "bf16": 0.35, "fp16": 0.4, "fp8": 0.3}
_TUNED, _COMPILED, _NATIVE = 0.75, 0.85, 0.5
# Under so much work the calls of operators take most of a step on a CPU: autocast and a change of
# layout are more calls (LeNet at batch 4, 16 MFLOP: 1.48 ms plain, 1.75 ms with autocast). Where
# the work is not known the time of a step tells, unless the machine is busy.
_SMALL_FLOPS, _SMALL_MS = 5e8, 5.0
# Above so much work the calls of our own kernels are nothing beside what they do.
_ONE_GRAPH_FLOPS = 2e10
_COMPILED_SMALL, _LOW_SMALL = 0.5, 1.15
_COMPILE_S, _EAGER_S = 40.0, 3.0
_VARIATION = 0.98
_READ_AHEAD = 2  # batches
_MOST_WORKERS = 16  # that are tried: each holds some memory of its own
_SPLIT_FROM = 64  # samples of a batch that may be worth splitting


@dataclass(frozen=True, kw_only=True)
class TrainSituation:
    """What decides which training plans are legal.

    Attributes:
        machine: Device, cores and instruction sets.
        images: Whether inputs have four dimensions.
        blocks: Whether the model has blocks whose activations could be recomputed.
        fits: Whether all samples fit on the device, and are the same in each epoch.
        reads: Workers that the samples are read with at present, where they come from a data set
            that is read while the run goes on; None where they are tensors.
        why_not_compiled: Why torch.compile cannot be used, in one line; "" if it can.
        kernels: Rows of the table of fused kernels that fit the model, joined by commas where they
            go together, with the decisions of a plan that they need.
        native_update: Whether the optimiser's update can be one native pass.
        fp8: Whether there are layers that fp8 computes.
        flops: Operations of a step; None where they are not known.
        written: Precision that the settings mean, for the baseline.
        own: The plan that a recipe was tuned with; tried as the first coarse one.
    """

    machine: Situation
    images: bool
    blocks: bool = False
    fits: bool = True
    reads: int | None = None
    why_not_compiled: str = ""
    kernels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    native_update: bool = False
    fp8: bool = False
    flops: float | None = None
    written: TrainPrecision = "fp32"
    own: TrainPlan | None = None


def train_candidates(situation: TrainSituation, *, eager_ms: float) -> tuple[Candidate, ...]:
    """List the plans: baselines, then coarse plans, then variations of each.

    Args:
        situation: Where they have to work.
        eager_ms: Step of plain eager fp32, measured quickly or estimated; positive.
    """
    found: dict[str, Candidate] = {}
    for candidate in (
        *_baselines(situation, eager_ms),
        *_coarse(situation, eager_ms),
        *_variations(situation, eager_ms),
    ):
        known = found.get(candidate.plan.key)
        if known is None:
            found[candidate.plan.key] = candidate
        elif candidate.coarse:
            found[candidate.plan.key] = replace(known, coarse=True)
    return tuple(found.values())


def _baselines(situation: TrainSituation, eager_ms: float) -> Iterator[Candidate]:
    """What a person has: the plain loop in fp32, with autocast, with torch.compile."""
    plain = TrainPlan(device=situation.machine.device)
    if situation.reads:
        plain = plain.with_(workers=situation.reads, prefetch=_READ_AHEAD)
    low: TrainPrecision = "bf16"
    plans = [plain, plain.with_(precision=low), plain.with_(compile="default")]
    if situation.written == low:
        plans[2] = plans[2].with_(precision=low)
    for plan in plans:
        yield _candidate(plan, situation, eager_ms, baseline=True)


def _coarse(situation: TrainSituation, eager_ms: float) -> Iterator[Candidate]:
    if situation.own is not None:
        yield _candidate(situation.own, situation, eager_ms, coarse=True)
    small = _small(situation, eager_ms)
    for precision in _precisions(situation):
        tuned = _tuned(situation, small=small).with_(precision=precision)
        yield _candidate(tuned, situation, eager_ms, coarse=True)
        compiled = tuned.with_(compile="default", compile_scope="joint" if small else "model")
        yield _candidate(compiled, situation, eager_ms, coarse=True)
    tuned, machine = _tuned(situation, small=small), situation.machine
    for row, needed in situation.kernels.items():
        with_row = tuned.with_(kernels=tuple(row.split(",")), **needed)
        yield _candidate(with_row, situation, eager_ms, coarse=True)
        if machine.kind == "cpu" and (situation.flops or 0.0) < _ONE_GRAPH_FLOPS:
            joined = with_row.with_(compile="default", compile_scope="joint")
            yield _candidate(joined, situation, eager_ms, coarse=True)


def _precisions(situation: TrainSituation) -> list[TrainPrecision]:
    known: list[TrainPrecision] = ["bf16", "fp32"]
    if situation.machine.kind == "cuda":
        known += ["tf32", "fp16"]
        known += ["fp8"] if situation.fp8 else []
    return known


def _small(situation: TrainSituation, eager_ms: float) -> bool:
    if situation.machine.kind != "cpu":
        return False
    return eager_ms < _SMALL_MS if situation.flops is None else situation.flops < _SMALL_FLOPS


def _tuned(situation: TrainSituation, *, small: bool) -> TrainPlan:
    """What is the better choice nearly everywhere."""
    return TrainPlan(
        device=situation.machine.device,
        memory_layout="channels_last" if situation.images and not small else "contiguous",
        optimizer_kernel="native" if situation.native_update else "fused",
        data="resident" if situation.fits else "streamed",
        workers=0 if situation.fits or situation.reads is None else situation.reads or 1,
        prefetch=0 if situation.fits else _READ_AHEAD,
        pinned=not situation.fits and situation.machine.kind == "cuda",
        keep_memory=True,
        flush_denormals=situation.machine.kind == "cpu",
    )


def _variations(situation: TrainSituation, eager_ms: float) -> Iterator[Candidate]:
    """All combinations of the lesser decisions, family by family.

    The search walks from a family's best to those that differ from it in one decision, so that each
    of them must be there in company with the others.
    """
    for candidate in list(_coarse(situation, eager_ms)):
        if candidate.why_not:
            continue
        plan = TrainPlan.from_plan(candidate.plan)
        for changes in itertools.product(*_choices(plan, situation)):
            found: dict[str, object] = {}
            for change in changes:
                found.update(change)
            if not found:
                continue
            changed = plan.with_(**found)
            try:
                changed.checked()
            except BadInputError:
                continue
            count = sum(bool(change) for change in changes)
            yield _candidate(changed, situation, eager_ms * _VARIATION**count)


def _choices(plan: TrainPlan, situation: TrainSituation) -> list[list[dict[str, object]]]:
    """For each lesser decision what may be changed in the plan; the first leaves it as it is."""
    machine, same = situation.machine, dict[str, object]()
    choices: list[list[dict[str, object]]] = []
    if situation.images:
        other = plan.memory_layout == "channels_last"
        choices.append([same, {"memory_layout": "contiguous" if other else "channels_last"}])
    if machine.kind == "cpu" and machine.cores > 1:
        counts = sorted({1, machine.cores // 2})
        threads: list[dict[str, object]] = [{"threads": count} for count in counts]
        choices.append([same, *threads])
    if plan.compile == "default":
        scopes = [scope for scope in ("model", "step", "joint") if scope != plan.compile_scope]
        modes: list[dict[str, object]] = [{"compile_scope": scope} for scope in scopes]
        modes.append({"compile": "max-autotune"})
        if machine.kind == "cuda":
            modes.append({"compile": "reduce-overhead"})
        choices.append([same, *modes])
    elif plan.kernels and machine.kind == "cuda":
        choices.append([same, {"compile": "default"}])
    if plan.precision == "bf16" and plan.kernels in ((), ("attention",)):
        choices.append([same, {"weights": "bf16"}])
    updates: list[dict[str, object]] = [{"optimizer_kernel": "foreach"}]
    if plan.optimizer_kernel == "native":
        updates.append({"optimizer_kernel": "fused"})
    choices.append([same, *updates])
    if machine.batch >= _SPLIT_FROM:
        choices.append([same, {"micro_batch": machine.batch // 2}])
    streamed = {"data": "streamed", "prefetch": _READ_AHEAD, "pinned": machine.kind == "cuda"}
    if situation.reads is not None:
        counts = sorted(
            {0, 1, min(machine.cores, _MOST_WORKERS)}
            - {plan.workers if plan.data == "streamed" else -1}
        )
        choices.append([same, *({**streamed, "workers": count} for count in counts)])
    elif plan.data == "resident":
        choices.append([same, streamed])
    if situation.blocks and not plan.kernels:
        choices.append([same, {"checkpointing": True}])
    choices.append([same, {"keep_memory": not plan.keep_memory}])
    return choices


def _candidate(
    plan: TrainPlan,
    situation: TrainSituation,
    eager_ms: float,
    *,
    coarse: bool = False,
    baseline: bool = False,
) -> Candidate:
    why_not = why_not_precision(plan.precision, situation.machine)
    small = _small(situation, eager_ms)
    factor = _LOW_SMALL if small and plan.precision != "fp32" else _PROMISE[plan.precision]
    if plan.keep_memory:
        factor *= _TUNED
    build_s = _EAGER_S
    if plan.compile != "none":
        why_not = why_not or situation.why_not_compiled
        factor *= _COMPILED_SMALL if small else _COMPILED
        build_s = _COMPILE_S * (3 if plan.compile == "max-autotune" else 1)
    if plan.kernels:
        factor *= _NATIVE
    return Candidate(
        plan=plan.as_plan(),
        expected_ms=eager_ms * factor,
        build_s=build_s,
        coarse=coarse,
        baseline=baseline,
        why_not=why_not,
    )
