"""The legal plans of a situation, each with what it is expected to give and to cost.

Every plan that makes sense is listed, once. A plan that takes each backend's first choice is
*coarse*: there is one per family (backend and precision or scheme). The others differ from it in
layout, threads, streams, sub-batch or options, and the search comes to them only in the families
that turn out fast.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from suanli.base.plan import BackendSpec, Option, Plan, Quantization
from suanli.plans.situation import (
    Situation,
    scheme_precision,
    why_not_precision,
    why_not_scheme,
)

__all__ = ["Candidate", "Situation", "candidates", "decisions", "family"]

_DEVICE_KINDS = frozenset({"cpu", "cuda"})
_UNKNOWN_PROMISE = 0.7  # a backend that says nothing is expected to gain a little over eager

# What a decision is expected to do to the step of its family's coarse plan, for ordering only: the
# search replaces each figure by what it sees. Two one-core streams took 0.71 of the time of one
# two-core stream (ResNet-50, int8, batch split).
_STREAMS_THROUGHPUT = 0.85
_STREAMS_LATENCY = 0.92
_SUB_BATCH = 1.0
_OTHER_LAYOUT = 1.05
_OPTION = 0.97
_FEW_THREADS_TINY = 0.9  # below a millisecond, waking threads costs more than they give
_FEW_THREADS_SMALL = 1.1
_FEW_THREADS_LARGE = 1.4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that could be tried.

    Attributes:
        plan: The plan.
        expected_ms: Step time by promise, not measured; for ordering only.
        build_s: Seconds that its build is expected to take.
        coarse: Whether it is its family's first plan.
        baseline: Whether a person has it without Suanli. The first baseline is the reference.
        why_not: Why it cannot be tried here, in one line; "" if it can.
    """

    plan: Plan
    expected_ms: float
    build_s: float
    coarse: bool = False
    baseline: bool = False
    why_not: str = ""

    @property
    def family(self) -> str:
        """Backend and precision (or scheme): "openvino bf16", "torchao int8-weight"."""
        return family(self.plan)


def family(plan: Plan) -> str:
    """Backend and precision (or scheme) of a plan."""
    return f"{plan.backend} {_number_format(plan)}"


def decisions(plan: Plan) -> dict[str, object]:
    """What distinguishes a plan inside its family, by the decision's name.

    Streams and threads are one decision, because together they divide the cores.
    """
    found: dict[str, object] = {
        "layout": plan.memory_layout,
        "split": (plan.streams, plan.threads),
        "sub_batch": plan.sub_batch,
    }
    found.update({f"option {name}": value for name, value in plan.options.items()})
    return found


def candidates(
    specs: Sequence[BackendSpec], situation: Situation, *, eager_ms: float = 1.0
) -> tuple[Candidate, ...]:
    """List the legal plans: baselines first, then the coarse plans, then their variations.

    What a person may miss is listed too, with `why_not`: an absent backend (with its install
    command), a precision without instructions, a quantisation that nothing could accept.

    Args:
        specs: Rows of the backend table.
        situation: Where the plans have to work.
        eager_ms: Step time of eager fp32 at the batch, measured quickly or estimated; positive.

    Returns:
        Candidates with distinct plans. The first one is the reference (eager fp32) if any backend
        has it among its baselines.
    """
    here = [spec for spec in specs if situation.kind in spec.devices]
    usable = [s for s in here if s.name in situation.present]
    if not situation.exported:
        unable = [s for s in usable if s.needs_export]
        usable = [s for s in usable if not s.needs_export]
    else:
        unable = []
    found: dict[str, Candidate] = {}
    for candidate in itertools.chain(
        _baselines(usable, situation, eager_ms),
        *(_space(spec, situation, eager_ms) for spec in usable),
        (_left_out(spec, situation, "the model cannot be exported") for spec in unable),
        (_absent(spec, situation) for spec in here if spec.name not in situation.present),
    ):
        known = found.get(candidate.plan.key)
        if known is None:
            found[candidate.plan.key] = candidate
        elif candidate.coarse:
            found[candidate.plan.key] = replace(known, coarse=True)
    return tuple(sorted(found.values(), key=_listing_order))


def _listing_order(candidate: Candidate) -> int:
    if candidate.why_not:
        return 3
    return 0 if candidate.baseline else 1 if candidate.coarse else 2


def _baselines(
    specs: Sequence[BackendSpec], situation: Situation, eager_ms: float
) -> Iterator[Candidate]:
    for spec in specs:
        for listed in spec.baselines:
            if listed.device.partition(":")[0] != situation.kind:
                continue
            plan = listed.with_(device=situation.device)
            yield Candidate(
                plan=plan,
                expected_ms=eager_ms * _promise(spec, plan),
                build_s=spec.build_s * situation.build_scale,
                baseline=True,
                why_not=why_not_precision(plan.precision, situation),
            )


def _space(spec: BackendSpec, situation: Situation, eager_ms: float) -> Iterator[Candidate]:
    """Every plan of one backend."""
    if situation.exported:
        for start, why_not in _families(spec, situation):
            if why_not:
                yield _left_out(spec, situation, why_not, start)
            else:
                options = _for_the_batch(spec, _options(spec, start), situation)
                yield from _variations(spec, start, options, situation, eager_ms)
        return
    for baseline in _baselines([spec], situation, eager_ms):
        if not baseline.why_not:
            start = baseline.plan
            yield from _variations(spec, start, [start.options], situation, eager_ms)


def _families(spec: BackendSpec, situation: Situation) -> Iterator[tuple[Plan, str]]:
    """A bare plan per precision and scheme of a backend, with why it is not legal or ""."""
    for precision in spec.precisions.get(situation.kind, ()):
        plan = Plan(backend=spec.name, precision=precision, device=situation.device)
        yield plan, why_not_precision(precision, situation)
    for scheme in spec.quantizations.get(situation.kind, ()):
        samples = situation.calibration_samples if scheme.endswith("-static") else 0
        plan = Plan(
            backend=spec.name,
            precision=scheme_precision(scheme),
            device=situation.device,
            quantization=Quantization(scheme=scheme, calibration_samples=samples),
        )
        yield plan, why_not_scheme(scheme, situation)


def _variations(
    spec: BackendSpec,
    start: Plan,
    options: Sequence[dict[str, Option]],
    situation: Situation,
    eager_ms: float,
) -> Iterator[Candidate]:
    """The coarse plan of a family and all that differ from it."""
    layouts = _layouts(spec, situation)
    expected_ms = eager_ms * _promise(spec, start)
    for layout, (streams, threads), chosen in itertools.product(
        layouts, _splits(spec, situation), options
    ):
        for sub_batch in _sub_batches(spec, situation, streams):
            plan = start.with_(
                memory_layout=layout,
                streams=streams,
                threads=threads,
                sub_batch=sub_batch,
                options=chosen,
            )
            default = layout == layouts[0] and (streams, threads, sub_batch) == (1, 0, 0)
            factor = _expected_factor(plan, situation, expected_ms, layout != layouts[0])
            yield Candidate(
                plan=plan,
                expected_ms=expected_ms * factor,
                build_s=spec.build_s * situation.build_scale,
                coarse=default and chosen == options[0],
            )


def _expected_factor(
    plan: Plan, situation: Situation, expected_ms: float, other_layout: bool
) -> float:
    """Expected step relative to the family's coarse plan. Dimensionless, see the constants."""
    factor = _OTHER_LAYOUT if other_layout else 1.0
    if plan.streams > 1:
        throughput = situation.objective == "throughput"
        factor *= _STREAMS_THROUGHPUT if throughput else _STREAMS_LATENCY
    elif plan.threads:
        small = _FEW_THREADS_SMALL if expected_ms < 5 else _FEW_THREADS_LARGE
        factor *= _FEW_THREADS_TINY if expected_ms < 1 else small
    if plan.sub_batch:
        factor *= _SUB_BATCH
    return factor * _OPTION ** len(plan.options)


def _layouts(spec: BackendSpec, situation: Situation) -> list[str]:
    """Memory layouts worth trying, channels_last first: it suits the matrix units."""
    if not situation.images:
        return ["contiguous"]
    return sorted(spec.layouts, key=lambda layout: layout != "channels_last")


def _splits(spec: BackendSpec, situation: Situation) -> list[tuple[int, int]]:
    """(streams, threads of each). (1, 0) is one stream on all cores."""
    found = [(1, 0)]
    if situation.kind != "cpu" or situation.cores < 2:
        return found
    found += [(1, threads) for threads in sorted({situation.cores // 2, 1}, reverse=True)]
    if spec.streams and situation.splits:
        found += [
            (streams, situation.cores // streams)
            for streams in range(2, min(situation.cores, situation.batch) + 1)
            if situation.cores % streams == 0
        ]
    return found


def _sub_batches(spec: BackendSpec, situation: Situation, streams: int) -> list[int]:
    """Samples of one call: 0 is a stream's whole share; smaller ones keep data in the caches."""
    if not spec.streams or not situation.splits:
        return [0]
    share = math.ceil(situation.batch / streams)
    return [0, *(size for size in (1, 4, 16, 64) if size < share)]


def _options(spec: BackendSpec, plan: Plan) -> list[dict[str, Option]]:
    """All combinations of options that differ from the defaults; the first is all defaults."""
    names = [n for n in spec.options if _fits(spec.option_needs.get(n, ()), plan)]
    choices = [spec.options[name] for name in names]
    return [
        {
            name: value
            for name, value, listed in zip(names, values, choices, strict=True)
            if value != listed[0]
        }
        for values in itertools.product(*choices)
    ]


def _for_the_batch(
    spec: BackendSpec, options: list[dict[str, Option]], situation: Situation
) -> list[dict[str, Option]]:
    """Tell a backend that compiles for one batch size which one is asked for."""
    if not spec.batch_option or not situation.dynamic:
        return options
    return [{**chosen, spec.batch_option: situation.batch} for chosen in options]


def _fits(needs: Sequence[str], plan: Plan) -> bool:
    """Whether an option makes sense in a plan (see `BackendSpec.option_needs`)."""
    kinds = set(needs) & _DEVICE_KINDS
    formats = set(needs) - _DEVICE_KINDS
    if kinds and plan.device.partition(":")[0] not in kinds:
        return False
    return not formats or bool(formats & {_number_format(plan), plan.precision})


def _promise(spec: BackendSpec, plan: Plan) -> float:
    kind = plan.device.partition(":")[0]
    for name in (_number_format(plan), plan.precision):
        for key in (f"{kind}/{name}", name):
            if key in spec.promise:
                return spec.promise[key]
    return _UNKNOWN_PROMISE


def _number_format(plan: Plan) -> str:
    return plan.quantization.scheme if plan.quantization else plan.precision


def _absent(spec: BackendSpec, situation: Situation) -> Candidate:
    reason = situation.why_absent.get(spec.name, f"{spec.name} is not installed")
    return _left_out(spec, situation, f"{reason} ({spec.install})" if spec.install else reason)


def _left_out(
    spec: BackendSpec, situation: Situation, why_not: str, plan: Plan | None = None
) -> Candidate:
    """An entry for what is not tried, so that a person sees why."""
    if plan is None:
        precisions = spec.precisions.get(situation.kind) or ("fp32",)
        plan = Plan(backend=spec.name, precision=precisions[0], device=situation.device)
    return Candidate(plan=plan, expected_ms=math.inf, build_s=0.0, why_not=why_not)
