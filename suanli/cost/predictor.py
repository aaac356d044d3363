"""Time of a workload's step on a GPU that is not here, from its sheet and the work's operators.

Each operator becomes the kernels that would run it, each kernel gets the longer of its arithmetic
and its memory time on this card (joined where they overlap in part), with the efficiency that its
shape allows; the host's time to start them hides behind the device's or shows.

    predict_operators(work, gpu, dtype="bf16")                   one card
    transfer(work, measured_ms, source, target, dtype="fp16")    from a measurement on another
    simplest_bound_ms(work, gpu, dtype="bf16")                   time = work / (units x rate)

Several cards: `suanli.cost.scaling`. Power: `suanli.cost.power_draw`. CPU: `suanli.cost.cpu_time`.
"""

from dataclasses import replace

import numpy as np

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import OperatorTime, PlanKind, StepPrediction
from suanli.base.work import BoundBy, Work
from suanli.cost.gpu_rates import attention_share, first_cache_share, peak_flops, rates, unit_of
from suanli.cost.intervals import interval, spread_of
from suanli.cost.kernel_time import Number, joined, product_terms, reach, row_traffic
from suanli.cost.parameters import Parameters, Unit, parameters
from suanli.cost.power_draw import mean_power_w
from suanli.cost.rates import between, element_bytes, narrowed
from suanli.cost.work_kernels import KINDS, STARTS, TRAFFIC, How, Kernels, is_winograd, kernels_of

# Multiplications that the fast algorithms leave of a 3 x 3 convolution: F(4 x 4, 3 x 3).
_FEWEST = 4.0


def predict_operators(
    work: Work,
    gpu: GpuSheet,
    *,
    dtype: str,
    plan_kind: PlanKind = "eager",
    autocast: bool | None = None,
    channels_last: bool | None = None,
    constants: Parameters | None = None,
) -> StepPrediction:
    """Predict one step on one card.

    Args:
        work: Of one step, as captured at fp32 or at `dtype`.
        gpu: The card's sheet.
        dtype: What products run in: "fp32", "tf32", "bf16", "fp16", "fp8" or "int8".
        plan_kind: Operator by operator as PyTorch does, or compiled and fused.
        autocast: Mixed precision, with weights kept in fp32 and narrowed in every step. None is
            yes for training in a type narrower than fp32 and no for inference.
        channels_last: Whether images lie channels last. None is yes in types narrower than fp32,
            as published recipes have it for tensor units, and no in others, as PyTorch does.
        constants: Other parameters than those that ship, for fits and tests.

    Returns:
        The step's median and 90 % interval, its parts and each operator's time.

    Raises:
        BadInputError: The card has no units for the type, or its sheet lacks what cannot be done
            without (bandwidth).
    """
    p = constants or parameters()
    known = rates(gpu, p, dtype)
    how = how_of(work, dtype, plan_kind, autocast=autocast, channels_last=channels_last)
    kernels = kernels_of(work, how)
    terms = kernel_terms(kernels, gpu, p, dtype)
    operators = _by_operator(work, kernels, terms, p)
    device_s, idle_s = step_seconds(kernels, terms, gpu, p)
    compute_ms = sum(o.ms for o in operators if o.bound_by == "compute")
    memory_ms = sum(o.ms for o in operators if o.bound_by == "memory")
    starts_ms = sum(o.ms for o in operators if o.bound_by == "overhead")
    step_ms = 1e3 * (device_s + idle_s)
    parts: dict[BoundBy, float] = {
        "compute": compute_ms,
        "memory": memory_ms,
        "overhead": starts_ms + 1e3 * idle_s,
    }
    waiting = idle_s / max(device_s + idle_s, 1e-12)
    spread, reasons = spread_of(gpu, known.missing, p, waiting=waiting)
    watts = mean_power_w(
        gpu,
        p.clock,
        flops_per_s=work.matmul_flops / max(device_s + idle_s, 1e-12),
        bytes_per_s=float(np.sum(moved_bytes(kernels, p))) / max(device_s + idle_s, 1e-12),
        unit=known.unit,
        busy=device_s / max(device_s + idle_s, 1e-12),
    )
    return StepPrediction(
        step_ms=interval(step_ms, spread),
        bound_by=max(parts, key=lambda name: parts[name]),
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        overhead_ms=parts["overhead"],
        sol_ms=least_ms(work, gpu, dtype=dtype),
        operators=tuple(operators),
        spread=spread,
        widened=reasons,
        power_w=watts,
        energy_j=None if watts is None else watts * step_ms / 1e3,
        idle_share=waiting,
    )


def how_of(
    work: Work,
    dtype: str,
    plan_kind: PlanKind,
    *,
    autocast: bool | None,
    channels_last: bool | None,
) -> How:
    """How the operators run; what is None as `predict_operators` says."""
    narrow = dtype not in ("fp32", "tf32")
    training = any(op.phase == "backward" for op in work.operators)
    return How(
        dtype=dtype,
        plan_kind=plan_kind,
        autocast=training and narrow if autocast is None else autocast,
        channels_last=narrow if channels_last is None else channels_last,
    )


def transfer(
    work: Work,
    measured_ms: float,
    source: GpuSheet,
    target: GpuSheet,
    *,
    dtype: str,
    source_dtype: str | None = None,
    plan_kind: PlanKind = "eager",
    constants: Parameters | None = None,
) -> StepPrediction:
    """Predict a step on `target` from its measured time on `source`.

    The measurement carries what the model does not know of the job (input pipeline, library
    versions), so only the ratio of two predictions is used, and the interval is narrower: errors
    that both predictions share cancel.

    Args:
        work: Of one step.
        measured_ms: The step on `source`.
        source: The card that was measured.
        target: The card asked for.
        dtype: What products run in on `target`.
        source_dtype: The same on `source`, where it differs.
        plan_kind: As in `predict_operators`.
        constants: As in `predict_operators`.

    Raises:
        BadInputError: `measured_ms` is not positive, or one of the cards cannot run the type.
    """
    if not measured_ms > 0:
        raise BadInputError("the measured step must take more than 0 ms")
    p = constants or parameters()
    here = predict_operators(
        work, source, dtype=source_dtype or dtype, plan_kind=plan_kind, constants=p
    )
    there = predict_operators(work, target, dtype=dtype, plan_kind=plan_kind, constants=p)
    factor = measured_ms / here.step_ms.p50
    spread = max(0.0, there.spread**2 - p.spread.base**2) + p.spread.transfer**2
    watts = there.power_w
    p50 = there.step_ms.p50 * factor
    return replace(
        there,
        step_ms=interval(p50, spread**0.5),
        spread=spread**0.5,
        energy_j=None if watts is None else watts * p50 / 1e3,
    )


def simplest_bound_ms(work: Work, gpu: GpuSheet, *, dtype: str, devices: int = 1) -> float:
    """The articles' formula: time = work / (parallel units x rate of each).

    It assumes that every unit of every device is busy with products at the printed clock from the
    first moment to the last: no memory traffic, no starts, no communication, no partly filled tile.
    A lower bound on the time, never an estimate.

    Raises:
        BadInputError: The card has no units for the type, or there is no device.
    """
    if devices < 1:
        raise BadInputError("at least one device is needed")
    return 1e3 * work.matmul_flops / (devices * peak_flops(gpu, dtype))


def least_ms(
    work: Work, gpu: GpuSheet, *, dtype: str, micro_batches: int = 1, state_share: float = 1.0
) -> float:
    """Least milliseconds that the sheet allows for the step's products or unavoidable bytes.

    Args:
        work: Of one micro-batch and the update.
        gpu: The card.
        dtype: What products run in.
        micro_batches: How many of them the step has. Each computes anew and has inputs and outputs
            of its own (keys and values of earlier tokens among them); weights could be read once,
            and there is one update.
        state_share: Part of the update that this device makes.

    Raises:
        BadInputError: The card has no units for the type.
    """
    fewer = unit_of(gpu, dtype) == "vector"
    flops = sum(
        op.least_flops / (_FEWEST if fewer and is_winograd(op) else 1.0)
        for op in work.operators
        if op.matmul
    )
    compute_s = flops * micro_batches / peak_flops(gpu, dtype)
    states = sum(op.bytes_read + op.bytes_written for op in work.operators if _updates(op.phase))
    read = work.parameter_bytes
    if work.read_parameter_bytes is not None:  # of a table the rows taken, at most all of them
        read = min(read, work.read_parameter_bytes)
    weights = narrowed(read, "fp32", dtype)
    passed = micro_batches * (work.input_bytes + work.output_bytes)
    kept = work.kept_elements * element_bytes(between(dtype)) * micro_batches
    moved = weights + passed + kept + states * state_share
    memory_s = moved / (gpu.memory_bytes_per_s or float("inf"))
    return 1e3 * max(compute_s, memory_s)


def _updates(phase: str) -> bool:
    return phase == "optimizer"


def kernel_terms(
    kernels: Kernels, gpu: GpuSheet, p: Parameters, dtype: str, *, alone: bool = False
) -> tuple[Number, Number, Number]:
    """Seconds per kernel, one array each: arithmetic, memory, starts; repeats included.

    Args:
        kernels: Of a step, or unrelated ones.
        gpu: The card.
        p: The constants.
        dtype: What products run in.
        alone: Whether each runs by itself, as in a benchmark of operators; a step that lasts
            warms the card until its clock falls.

    Raises:
        BadInputError: As `predict_operators`.
    """
    known = rates(gpu, p, dtype)
    apart = known.unit == "tensor" and bool(np.any(kernels["vector"] > 0))
    vector_flops = rates(gpu, p, "fp32").machine.flops if apart else known.machine.flops
    vector_flops = vector_flops * first_cache_share(gpu)
    flops = np.where(kernels["vector"] > 0, vector_flops, known.machine.flops)
    flops = flops * _shares(p, known.unit, gpu)[_index(kernels, "share")]
    turned = np.isin(_index(kernels, "traffic"), _TURNED)
    machine = replace(known.machine, flops=np.where(turned, p.layout_fraction * flops, flops))
    shape = p.products[known.unit]
    has = kernels["batch"] > 0
    moved = kernels["moved"] * _traffic(p)[_index(kernels, "traffic")]
    slices = np.where(kernels["kind"] == KINDS.index("product"), shape.sum_slice, 1.0)
    compute_s, memory_s = product_terms(
        machine,
        shape,
        batch=np.maximum(kernels["batch"], 1.0),
        sizes=(kernels["m"], kernels["n"], np.ceil(kernels["k"] / slices) * slices),
        moved=moved,
    )
    # Channels by themselves fill no tiles: each thread sums over the taps of its own results.
    done = 2.0 * kernels["batch"] * kernels["m"] * kernels["n"] * kernels["k"]
    compute_s = np.where(kernels["vector"] > 0, done / machine.flops, compute_s)
    compute_s = np.where(has, compute_s, 0.0) / (1.0 if alone else known.lasting)
    again = row_traffic(
        machine,
        p.rows,
        row_bytes=np.maximum(kernels["row_bytes"], 1.0),
        at_once=kernels["at_once"],
        second_read=kernels["second_read"],
    )
    moved = moved * np.where(kernels["row_bytes"] > 0, again, 1.0)
    memory_s = np.where(has, memory_s, moved / reach(machine, shape, moved))
    starts = machine.kernel_s * _starts(p)[_index(kernels, "starts")]
    starts = np.where(_index(kernels, "starts") == _STEP, p.recurrent_step_s, starts)
    repeat = kernels["repeat"]
    return compute_s * repeat, memory_s * repeat, starts * repeat


_STEP = STARTS.index("step")
_TURNED = (TRAFFIC.index("layout"), TRAFFIC.index("layout gradient"))


def _index(kernels: Kernels, name: str) -> Number:
    return kernels[name].astype(int)


def moved_bytes(kernels: Kernels, p: Parameters) -> Number:
    """Bytes that each kernel of a step reads and writes, its repeats included."""
    return kernels["moved"] * _traffic(p)[_index(kernels, "traffic")] * kernels["repeat"]


def _shares(p: Parameters, unit: Unit, gpu: GpuSheet) -> Number:
    """In the order of `SHARES`."""
    convolution = p.convolution_fraction[unit]
    fewer = p.winograd_gain if unit == "vector" else 1.0
    return np.array(
        [
            1.0,
            convolution,
            p.grouped_fraction,
            p.depthwise_fraction,
            p.depthwise_fraction / 2.0,
            p.attention_fraction[unit] * (attention_share(gpu) if unit == "tensor" else 1.0),
            convolution * fewer,
            convolution * p.gradient_fraction,
            p.grouped_gradient_fraction,
            p.depthwise_gradient_fraction,
            p.depthwise_gradient_fraction / 2.0,
            convolution * fewer * p.gradient_fraction,
        ]
    )


def _traffic(p: Parameters) -> Number:
    """In the order of `TRAFFIC`."""
    return np.array(
        [
            1.0,
            p.layout_traffic,
            p.fused_traffic,
            p.update_traffic,
            p.layout_gradient_traffic,
        ]
    )


def _starts(p: Parameters) -> Number:
    """In the order of `STARTS`; libraries update about thirty tensors of a list in one kernel."""
    return np.array([1.0, p.fused_launches, 1.0 / 30.0, 1.0, 0.0])


def host_seconds(kernels: Kernels, gpu: GpuSheet, p: Parameters) -> float:
    """Seconds that the usual host of such a card takes to call all operators of a step."""
    calls_s = kernels.calls * p.host_forward_s + kernels.backward_calls * p.host_backward_s
    calls_s = calls_s * (p.fused_launches if kernels.compiled else 1.0)
    older = 8.0 - float(gpu.compute_capability)
    return float((calls_s + kernels.updates * p.host_update_s) * p.host_generation**older)


def step_seconds(
    kernels: Kernels, terms: tuple[Number, Number, Number], gpu: GpuSheet, p: Parameters
) -> tuple[float, float]:
    """Seconds in which the device works, and those in which it waits for the host.

    Args:
        kernels: Of the step.
        gpu: The card.
        terms: As `kernel_terms` gives them.
        p: The constants.
    """
    compute_s, memory_s, start_s = terms
    device_s = float(np.sum(joined(p.products["vector"], compute_s, memory_s) + start_s))
    return device_s, waiting_s(device_s, host_seconds(kernels, gpu, p))


def waiting_s(device_s: float, host_s: float) -> float:
    """Seconds that the device waits for a host that runs ahead of it where it can.

    All of the excess where the host is far slower, none where it is far faster, and some between,
    because a step has stretches of many small operators and of few large ones.
    """
    larger = max(device_s, host_s, 1e-12)
    both = larger * ((device_s / larger) ** 4 + (host_s / larger) ** 4) ** 0.25
    return float(both - device_s)


def _by_operator(
    work: Work, kernels: Kernels, terms: tuple[Number, Number, Number], p: Parameters
) -> list[OperatorTime]:
    compute_s, memory_s, start_s = terms
    index = kernels["operator"].astype(int)
    total = np.bincount(index, joined(p.products["vector"], compute_s, memory_s) + start_s)
    of = {name: np.bincount(index, v) for name, v in (("c", compute_s), ("m", memory_s))}
    starts = np.bincount(index, start_s)
    launches = np.bincount(index, kernels["repeat"])
    kinds = dict(zip(index, kernels["kind"].astype(int), strict=True))
    found = []
    for i, kind in kinds.items():
        shares: dict[BoundBy, float] = {
            "compute": float(of["c"][i]),
            "memory": float(of["m"][i]),
            "overhead": float(starts[i]),
        }
        found.append(
            OperatorTime(
                name=work.operators[i].name,
                kind=KINDS[kind],
                phase=work.operators[i].phase,
                ms=1e3 * float(total[i]),
                launches=float(launches[i]),
                bound_by=max(shares, key=lambda name: shares[name]),
            )
        )
    return found
