"""A workload on one kind of card: the best legal layout, its time, memory, energy and cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.memory import MemoryUse
from suanli.base.predict_results import Cost, LeastTime, Prediction
from suanli.base.prediction import ParallelLayout, StepPrediction
from suanli.cost.collective_time import fabric_of
from suanli.cost.context import with_context
from suanli.cost.layouts import checked, legal_splits, micro_batches
from suanli.cost.memory import Held, memory_use, usable_bytes
from suanli.cost.predictor import how_of, predict_operators, simplest_bound_ms
from suanli.cost.rates import between, element_bytes
from suanli.cost.scaling import predict_parallel
from suanli.devices import slug
from suanli.predicting.ask import Ask, parse_layout
from suanli.predicting.prices import Prices
from suanli.predicting.subject import STATES, Subject

_MODEL_SOURCE = "suanli/cost/predictor.json: constants fitted on published measurements"
# Layouts whose time is worked out in full, by least memory traffic first.
_MOST_TIMED = 24
# Part of the memory that may be planned full: what is left serves the libraries' scratch space.
_FILL = 0.97


@dataclass(frozen=True, kw_only=True)
class _Choice:
    layout: ParallelLayout
    step: StepPrediction
    memory: MemoryUse
    fits: bool


def predict_on(
    subject: Subject,
    sheet: GpuSheet,
    ask: Ask,
    *,
    prices: Prices | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Prediction:
    """Predict one step of a workload on `ask.devices` cards of a kind.

    Args:
        subject: The workload, captured.
        sheet: The card.
        ask: How it is to run.
        prices: Of cards by the hour, or None.
        say: Told what is going on.

    Raises:
        BadInputError: The card lacks units for the type or figures that cannot be done without,
            or no layout divides the model.
    """
    batch = subject.checked_batch(ask.batch or subject.fixed_batch or usual_batch(ask))
    notes = list(subject.notes)
    network, said = ask.network(sheet)
    if ask.devices > 1 and ask.devices > fabric_of(sheet).inside.devices:
        notes.append(said)
    choice = _best(subject, sheet, ask, batch, network, say)
    if ask.kind == "compiled":
        notes.append("memory is that of eager execution: compiled plans need no more")
    if ask.dtype in ("fp8", "int8"):
        notes.append(f"weights of one byte, what passes between operators in bf16 ({ask.dtype})")
    step, name = choice.step, slug(sheet)
    simplest_ms = simplest_bound_ms(
        subject.work(batch), sheet, dtype=ask.dtype, devices=ask.devices
    )
    if not step.step_ms.p50 > 0:
        raise BadInputError(f"{subject.name} computes nothing: no operator takes time")
    return Prediction(
        gpu=name,
        n_devices=ask.devices,
        batch=batch,
        layout=choice.layout,
        plan=ask.plan_record("cuda:0"),
        step_ms=step.step_ms,
        samples_per_s=1e3 * batch / step.step_ms.p50,
        fits=choice.fits,
        memory=choice.memory,
        usable_bytes=usable_bytes(sheet),
        energy_j=step.energy_j,
        power_w=step.power_w,
        cost=None if prices is None else _cost(prices, name, ask.devices, batch, step),
        sol=LeastTime(
            ms=step.sol_ms, fraction=step.sol_ms / step.step_ms.p50, simplest_ms=simplest_ms
        ),
        bound_by=step.bound_by,
        compute_ms=step.compute_ms,
        memory_ms=step.memory_ms,
        overhead_ms=step.overhead_ms,
        communication_ms=step.communication_ms,
        sources=(*(source.document for source in sheet.sources), _MODEL_SOURCE),
        widened=step.widened,
        notes=tuple(notes),
    )


def usual_batch(ask: Ask) -> int:
    """One sample per card for inference, 32 for training."""
    return ask.devices * (32 if ask.training else 1)


def _cost(prices: Prices, name: str, devices: int, batch: int, step: StepPrediction) -> Cost | None:
    hourly = prices.per_hour.get(name)
    if hourly is None:
        return None
    per_step = hourly * devices * step.step_ms.p50 / 3.6e6
    return Cost(
        currency=prices.currency,
        per_hour=hourly * devices,
        per_step=per_step,
        per_million_samples=per_step / batch * 1e6,
    )


def _best(
    subject: Subject,
    sheet: GpuSheet,
    ask: Ask,
    batch: int,
    network: float,
    say: Callable[[str], None],
) -> _Choice:
    """The fastest layout that fits; where none does, the one that needs least memory."""
    found: list[tuple[ParallelLayout, MemoryUse, bool]] = []
    if ask.layout:
        layout = parse_layout(ask.layout)
        checked(subject.shape, layout, devices=ask.devices, batch=batch)
        if (layout.sharded or layout.recompute) and not subject.training:
            raise BadInputError("sharded and recompute are layouts of training")
        if (batch // layout.dp) % layout.micro_batches:
            raise BadInputError(
                f"{batch // layout.dp} samples of a replica do not divide into "
                f"{layout.micro_batches} micro-batches"
            )
        found = [_with_memory(subject, sheet, ask, batch, layout)]
    else:
        found = _candidates(subject, sheet, ask, batch)
    fitting = [entry for entry in found if entry[2]]
    tried = fitting[:_MOST_TIMED] or [min(found, key=lambda entry: entry[1].total_bytes)]
    choices = []
    for index, (layout, memory, fits) in enumerate(tried):
        if len(tried) > 1:
            say(f"{slug(sheet)}: layout {index + 1} of {len(tried)}")
        step = _time(subject, sheet, ask, batch, layout, network)
        choices.append(_Choice(layout=layout, step=step, memory=memory, fits=fits))
    best = min(choices, key=lambda choice: choice.step.step_ms.p50)
    return replace(best, memory=_with_memory(subject, sheet, ask, batch, best.layout, True)[1])


def _candidates(
    subject: Subject, sheet: GpuSheet, ask: Ask, batch: int
) -> list[tuple[ParallelLayout, MemoryUse, bool]]:
    """For each way to split: the plainest layout that fits, or the one of least memory."""
    together = sheet.nvlink_gpus or 8
    splits = list(legal_splits(subject.shape, devices=ask.devices, batch=batch, together=together))
    if not splits:
        raise BadInputError(
            f"no layout of {ask.devices} GPUs divides a batch of {batch} of {subject.name}",
            next_step=f"give --batch {ask.devices} or a multiple of it",
        )
    found = []
    for dp, tp, pp in splits:
        tries = []
        for sharded, recompute in ((False, False), (True, False), (False, True), (True, True)):
            # both are ways of training: inference gathers no weights and keeps no activations
            if (sharded and dp == 1) or ((sharded or recompute) and not subject.training):
                continue
            for parts in micro_batches(batch // dp, pp) if subject.training else [1]:
                layout = ParallelLayout(
                    dp=dp,
                    tp=tp,
                    pp=pp,
                    micro_batches=parts,
                    sharded=sharded,
                    recompute=recompute,
                )
                tries.append(_with_memory(subject, sheet, ask, batch, layout))
                if tries[-1][2] and (pp == 1 or len([t for t in tries if t[2]]) == 2):
                    break
            if any(fits for _, _, fits in tries):
                break
        fitting = [entry for entry in tries if entry[2]]
        found += fitting or [min(tries, key=lambda entry: entry[1].total_bytes)]
    return found


def _with_memory(
    subject: Subject,
    sheet: GpuSheet,
    ask: Ask,
    batch: int,
    layout: ParallelLayout,
    exact: bool = False,
) -> tuple[ParallelLayout, MemoryUse, bool]:
    micro = batch // (layout.dp * layout.micro_batches)
    width = element_bytes(between(ask.dtype))
    boundary = subject.shape.boundary_bytes * micro * width / 4.0
    held = Held(
        states=STATES.get(subject.optimizer, 0),
        update_copies=1.0 if ask.kind == "eager" and subject.optimizer.startswith("adam") else 0.0,
        weight_scale=0.5 if ask.dtype in ("fp8", "int8") else 1.0,
        kv_cache_bytes=_kv_cache(subject, ask, batch, width),
        boundary_bytes=int(boundary / subject.work(2).batch if subject.fixed_batch is None else 0),
    )
    use = memory_use(
        subject.footprint(micro),
        subject.shape,
        held,
        layout=layout,
        gpu=sheet,
        fragmentation=exact or layout.devices == 1,
    )
    return layout, use, use.total_bytes <= _FILL * usable_bytes(sheet)


def _kv_cache(subject: Subject, ask: Ask, batch: int, width: float) -> int:
    per_token = subject.shape.kv_bytes_per_token
    if ask.context and not per_token:
        raise BadInputError(f"--context: {subject.name} has no attention in every layer")
    return int(per_token * width / 2.0) * ask.context * batch


def _time(
    subject: Subject,
    sheet: GpuSheet,
    ask: Ask,
    batch: int,
    layout: ParallelLayout,
    network: float,
) -> StepPrediction:
    micro = batch // (layout.dp * layout.micro_batches)
    work = subject.work(micro)
    if ask.context:
        work = with_context(work, subject.shape, ask.context)
    if layout.devices == 1 and layout.micro_batches == 1 and not layout.recompute:
        return predict_operators(
            work, sheet, dtype=ask.dtype, plan_kind=ask.kind, channels_last=ask.channels_last
        )
    fabric = fabric_of(sheet, network_bytes_per_s=network) if layout.devices > 1 else None
    return predict_parallel(
        work,
        sheet,
        layout,
        dtype=ask.dtype,
        how=how_of(work, ask.dtype, ask.kind, autocast=None, channels_last=ask.channels_last),
        fabric=fabric,
    )
