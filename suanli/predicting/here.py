"""The same step on the machine at hand: from its measured ceilings, or timed."""

import statistics
import time
from collections.abc import Callable

import torch

from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceilings
from suanli.base.predict_results import Here, LeastTime, Prediction
from suanli.base.prediction import ParallelLayout
from suanli.cost.bound import speed_of_light
from suanli.cost.cpu_time import predict_cpu_ms
from suanli.cost.heap import handed_out_anew
from suanli.cost.memory import Held, memory_use
from suanli.cost.rates import peak
from suanli.devices import cpu_info
from suanli.predicting.ask import Ask
from suanli.predicting.subject import STATES, TARGETS, Subject
from suanli.workloads.record import Inputs, Workload

_STEPS = 5
_MOST_SECONDS = 20.0


def predict_cpu(subject: Subject, ceilings: Ceilings, ask: Ask, batch: int) -> Prediction:
    """Predict a step on this machine's processor.

    Args:
        subject: Captured with attention as the CPU runs it.
        ceilings: As `suanli doctor` measured them.
        ask: How it is to run.
        batch: Samples of a step.

    Raises:
        BadInputError: There are no products in the type.
    """
    rate = peak(ceilings, ask.dtype)
    if rate is None:
        known = sorted({c.dtype for c in ceilings.items if c.what == "matmul" and c.dtype})
        raise BadInputError(
            f"no rate in {ask.dtype} was measured on this CPU",
            next_step=f"measured: {', '.join(known)}",
        )
    work = subject.work(subject.checked_batch(batch))
    footprint = subject.footprint(batch)
    step = predict_cpu_ms(
        work,
        ceilings,
        precision=ask.dtype,
        plan_kind=ask.kind,
        fresh_bytes=handed_out_anew(footprint),
    )
    least = speed_of_light(work, ceilings, precision=ask.dtype)
    memory = memory_use(footprint, subject.shape, Held(states=STATES.get(subject.optimizer, 0)))
    usable = cpu_info().memory_bytes
    return Prediction(
        gpu="cpu",
        n_devices=1,
        batch=batch,
        layout=ParallelLayout(),
        plan=ask.plan_record("cpu"),
        step_ms=step,
        samples_per_s=1e3 * batch / step.p50,
        fits=memory.total_bytes <= usable,
        memory=memory,
        usable_bytes=usable,
        energy_j=None,
        power_w=None,
        cost=None,
        sol=LeastTime(
            ms=least.ms,
            fraction=least.ms / step.p50,
            simplest_ms=1e3 * work.matmul_flops / rate.value,
        ),
        bound_by=least.bound_by,
        compute_ms=least.compute_ms,
        memory_ms=least.memory_ms,
        overhead_ms=least.overhead_ms,
        communication_ms=0.0,
        sources=(f"ceilings measured here, {ceilings.measured_at}",),
        notes=subject.notes,
    )


def here(
    workload: Workload,
    subject: Subject,
    ceilings: Ceilings,
    ask: Ask,
    *,
    timed: bool,
    batch: int,
    say: Callable[[str], None] = lambda _: None,
) -> Here:
    """The step on this machine, predicted and, where asked, timed.

    Args:
        workload: What is timed, in eager execution.
        subject: The same, captured.
        ceilings: Of this machine.
        ask: How it is to run; timed is fp32 or, under autocast, bf16.
        timed: Whether to run some steps.
        batch: Samples of a step.
        say: Told what is going on.
    """
    predicted = predict_cpu_ms(
        subject.work(batch),
        ceilings,
        precision=_known(ask.dtype),
        fresh_bytes=handed_out_anew(subject.footprint(batch)),
    )
    measured = None
    if timed:
        say(f"timing a step of {batch} here")
        measured = step_ms(workload, batch, training=subject.training, dtype=ask.dtype)
    return Here(
        device=ceilings.device,
        batch=batch,
        predicted_ms=predicted,
        measured_ms=measured,
        samples_per_s=1e3 * batch / (measured or predicted.p50),
    )


def _known(dtype: str) -> str:
    """What the CPU has in place of a type that it lacks."""
    return {"tf32": "fp32", "fp8": "bf16", "fp16": "bf16"}.get(dtype, dtype)


def step_ms(workload: Workload, batch: int, *, training: bool, dtype: str) -> float:
    """Median milliseconds of an eager step on the CPU, the first one left out."""
    step = make_step(workload, batch, training=training, dtype=dtype)
    step()
    durations: list[float] = []
    end = time.perf_counter() + _MOST_SECONDS
    while len(durations) < _STEPS and (not durations or time.perf_counter() < end):
        started = time.perf_counter()
        step()
        durations.append(1e3 * (time.perf_counter() - started))
    return statistics.median(durations)


def make_step(workload: Workload, batch: int, *, training: bool, dtype: str) -> Callable[[], None]:
    """A plain eager step on the CPU: forward, or forward, backward and an SGD update."""
    model = workload.make_model().train(training)
    half = dtype not in ("fp32", "tf32")
    if half and not training:
        model = model.to(torch.bfloat16)
    inputs = workload.make_inputs(batch)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: (
            x.to(torch.bfloat16)
            if half and not training and isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
        ),
        (tuple(inputs.args), dict(inputs.kwargs)),
    )

    def infer() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(*args, **kwargs)
            loss = _loss(workload, inputs, out, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-6)

    return train if training else infer


def _loss(workload: Workload, inputs: Inputs, out: object, batch: int) -> torch.Tensor:
    """The workload's loss with labels of zeros, else the sum of the outputs, as captured."""
    if workload.loss is not None:
        for targets in TARGETS:
            try:
                return workload.loss(out, targets(inputs, batch))  # type: ignore[arg-type]
            except (ValueError, RuntimeError, TypeError, AttributeError):
                continue
    return _sum(out)


def _sum(out: object) -> torch.Tensor:
    tensors = [
        t
        for t in torch.utils._pytree.tree_leaves(out)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad
    ]
    total = tensors[0].sum()
    for tensor in tensors[1:]:
        total = total + tensor.sum()
    return total
