"""Memory of a step by kind: what torch's allocator gave, and what the cost model expected."""

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from suanli.base.profile_results import MemoryProfile
from suanli.base.work import Work
from suanli.devices import device as find_device
from suanli.profiling._stderr import without_stderr
from suanli.profiling.predicted_memory import predicted_memory
from suanli.profiling.subjects import Subject

_GRAD, _MARK = "suanli.grad:", "suanli.memory:"


def memory_profile(subject: Subject, work: Work | None) -> MemoryProfile | None:
    """Measure one step's memory, and predict it.

    The measurement counts what goes through torch: libraries that allocate for themselves, as
    OpenVINO does, show in `process_bytes` only.

    Args:
        subject: Warmed up, its conditions in force.
        work: Of the step as written.

    Returns:
        None where nothing of the step goes through torch.
    """
    if subject.layers is not None:
        return None
    where = find_device(subject.device)
    where.reset_peak_memory()
    found = _on_cuda(subject) if subject.device.startswith("cuda") else _on_cpu(subject)
    kinds = {f"{kind}_bytes": int(size) for kind, size in found.items()}
    return MemoryProfile(
        **kinds,
        total_bytes=sum(kinds.values()),
        predicted=predicted_memory(subject, work) if work is not None else None,
        process_bytes=where.memory().peak,
    )


def _models(subject: Subject) -> list[nn.Module]:
    own = [subject.stepper.model] if subject.stepper is not None else []
    return [*own, *subject.watched]


def _storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages, each once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def _parameters(subject: Subject) -> list[torch.Tensor]:
    """Of the models, and of the optimisers: those of a step of one's own are known by these."""
    own = subject.own.parameters() if subject.own is not None else []
    every = [*(p for m in _models(subject) for p in m.parameters()), *own]
    return list({id(p): p for p in every}.values())


def _weights(subject: Subject) -> int:
    buffers = [b for m in _models(subject) for b in m.buffers()]
    return _storages([*_parameters(subject), *buffers])


def _states(subject: Subject) -> int:
    values = [
        value
        for optimizer in subject.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return _storages(v for v in values if isinstance(v, torch.Tensor))


def _gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _on_cuda(subject: Subject) -> dict[str, int]:
    torch.cuda.synchronize(subject.device)
    torch.cuda.reset_peak_memory_stats(subject.device)
    subject.run()
    torch.cuda.synchronize(subject.device)
    peak = torch.cuda.max_memory_allocated(subject.device)
    gradients = _storages(_gradients(_parameters(subject)))
    weights, states = _weights(subject), _states(subject)
    rest = max(0, peak - weights - states - gradients)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "activations": rest,
        "workspace": 0,
    }


def _on_cpu(subject: Subject) -> dict[str, int]:
    """Follow the allocator through one step by the profiler's memory events."""
    parameters = _parameters(subject)
    if subject.own is None:
        for parameter in parameters:
            parameter.grad = None
    # gradients that a step of one's own finds: it frees them first, which the events do not say, or
    # overwrites them where they are
    there = {i: weakref.ref(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad and parameter.is_leaf:
                hook: Any = parameter.register_post_accumulate_grad_hook
                handle = hook(partial(_note_gradient, index))
                stack.callback(handle.remove)
        # it warns of blocks from before the recording, of which only the release is seen
        stack.enter_context(without_stderr())
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = stack.enter_context(
            torch.profiler.profile(activities=activities, profile_memory=True)
        )
        _note(_MARK + "begin")
        subject.run()
        _note(_MARK + "end")
    weights, states = _weights(subject), _states(subject)
    inputs = 0 if subject.training else subject.input_bytes
    kept = {
        str(index): grad.untyped_storage().nbytes()
        for index, grad in ((i, ref()) for i, ref in there.items())
        if grad is not None
    }
    before = weights + states + inputs + sum(kept.values())
    peak = _peak(_raw_events(profile), before, kept)
    rest = max(0, peak.total - weights - states - peak.gradients - peak.workspace)
    return {
        "weights": weights,
        "gradients": peak.gradients,
        "optimizer": states,
        "activations": rest,
        "workspace": peak.workspace,
    }


def _note(name: str) -> None:
    with torch.profiler.record_function(name):
        pass


def _note_gradient(index: int, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        _note(f"{_GRAD}{index}:{parameter.grad.untyped_storage().nbytes()}")


@dataclass(frozen=True, kw_only=True)
class RawEvent:
    """One event of the profiler: an allocation (`size` above 0), a release, or a call."""

    name: str
    start_ns: int
    end_ns: int
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fullest moment: all that is live, gradients among it, scratch space among it."""

    total: int
    gradients: int
    workspace: int


def _raw_events(profile: Any) -> list[RawEvent]:
    found = []
    for event in profile.profiler.kineto_results.events():
        start = int(event.start_ns())
        memory = event.name() == "[memory]"
        found.append(
            RawEvent(
                name=event.name(),
                start_ns=start,
                end_ns=start if memory else start + int(event.duration_ns()),
                size=int(event.nbytes()) if memory else 0,
            )
        )
    return found


def _peak(events: Sequence[RawEvent], before: int, kept: Mapping[str, int] | None = None) -> Peak:
    """The step's fullest moment.

    Scratch space is what is live then and gone when the operator that runs then is over.

    Args:
        events: Of one step between its two marks, in any order.
        before: Bytes that were there when it began.
        kept: Gradients among them that the step did not free, by parameter.
    """
    begin = next(e.end_ns for e in events if e.name == _MARK + "begin")
    end = next(e.start_ns for e in events if e.name == _MARK + "end")
    inside = sorted((e for e in events if begin <= e.start_ns <= end), key=lambda e: e.start_ns)
    now, most, at = before, before, begin
    for event in inside:
        now += event.size
        if now > most:
            most, at = now, event.start_ns
    held = dict(kept or {})  # by parameter: micro-batches add to a gradient that is there
    for event in inside:
        if event.name.startswith(_GRAD) and event.start_ns <= at:
            index, size = event.name.removeprefix(_GRAD).split(":")
            held[index] = int(size)
    gradients = sum(held.values())
    running = [e for e in inside if e.name.startswith("aten::") and e.start_ns <= at < e.end_ns]
    workspace = 0
    if running:
        over = min(running, key=lambda e: e.start_ns).end_ns
        after = sum(e.size for e in inside if e.size and at < e.start_ns <= over)
        workspace = max(0, -after)
    return Peak(total=most, gradients=gradients, workspace=workspace)
