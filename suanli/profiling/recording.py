"""The pass in which torch's profiler writes down every operator of some steps."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from suanli.profiling._stderr import without_stderr
from suanli.profiling.stopwatch import Mark, Part

_MARK, _STEP, _END = "suanli.part:", "suanli.step", "suanli.end"
# Spans that a library of collectives notes, from the call until all is there.
_COLLECTIVES = ("gloo:", "nccl:", "mpi:", "ucc:", "xccl:")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_MOVES_BETWEEN = ("Memcpy HtoD", "Memcpy DtoH", "[CUDA memcpy HtoD]", "[CUDA memcpy DtoH]")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A call that the profiler saw, with the calls inside it.

    Attributes:
        name: Such as "aten::convolution".
        start_ms: From the step's beginning.
        end_ms: The same.
        part: Part of the step that it began in.
        device_ms: Time of the kernels that it started, those of `children` included and copies
            between host and device left out; 0 on a CPU.
        kernels: Their names.
        calls: How many calls this is, itself and all inside.
    """

    name: str
    start_ms: float
    end_ms: float
    part: Part
    children: tuple["Node", ...] = ()
    device_ms: float = 0.0
    kernels: tuple[str, ...] = ()
    calls: int = 1

    @property
    def ms(self) -> float:
        """Wall time on the host."""
        return self.end_ms - self.start_ms


@dataclass(frozen=True, kw_only=True)
class KernelRun:
    """A kernel or copy on a device."""

    name: str
    start_ms: float
    end_ms: float
    stream: int = 0


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded step.

    Attributes:
        ms: The step, with the profiler's own cost in it.
        parts: (part, start, end) in milliseconds, as they followed each other.
        roots: Outermost calls on the thread that runs the step, and on autograd's for a device.
        aside: Calls of other threads, such as those that prepare batches.
        device: What ran on the device; empty on a CPU.
        exchanges: Collectives of the host's library, from their call until they are done.
    """

    ms: float
    parts: tuple[tuple[Part, float, float], ...]
    roots: tuple[Node, ...]
    aside: tuple[Node, ...] = ()
    device: tuple[KernelRun, ...] = ()
    exchanges: tuple[KernelRun, ...] = ()

    @property
    def calls(self) -> int:
        """All calls that were recorded on the step's thread."""
        return sum(node.calls for node in self.roots)


def record_steps(
    step: Callable[[Mark], object],
    *,
    steps: int,
    first: Part,
    device: str,
    sync: Callable[[], object] | None = None,
    max_seconds: float = 20.0,
    go_on: Callable[[bool], bool] = bool,
) -> list[Recording]:
    """Run steps under torch's profiler, without stacks and shapes, which would cost more.

    Args:
        step: Runs one step and tells when a part begins.
        steps: How many; fewer where time is out.
        first: The part that a step begins with.
        device: "cpu" or "cuda".
        sync: Waits until the device is done.
        max_seconds: Time for them.
        go_on: Told whether this process would run another step; says whether all do.
    """
    end = time.perf_counter() + max_seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about what it could record besides
        with recorder(device) as profile:
            for _ in range(steps):
                _note(_STEP)
                _note(_MARK + first)
                step(note_part)
                if sync is not None:
                    sync()
                _note(_END)
                if not go_on(time.perf_counter() <= end):
                    break
        events: Any = profile.events()  # type: ignore[no-untyped-call]
        return _recordings(events, on_device=device == "cuda")


@contextmanager
def recorder(device: str) -> Iterator[torch.profiler.profile]:
    """Torch's profiler as steps are recorded with it; its events are there afterwards.

    Args:
        device: "cpu" or "cuda".
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    with without_stderr():
        profile.start()
    try:
        with _one_call_each() if device == "cpu" else nullcontext():
            yield profile
    finally:
        with without_stderr():
            profile.stop()


@contextmanager
def _one_call_each() -> Iterator[None]:
    """Record each recurrent network of torch's layers as one call in inference, as it is counted.

    Inside it runs hundreds of small operators for every time step, and recording those took a fifth
    of the step.
    """
    for name in _RECURRENT:
        setattr(torch._VF, name, partial(_as_one, name))
    try:
        yield
    finally:
        for name in _RECURRENT:
            delattr(torch._VF, name)


def _as_one(name: str, *args: Any) -> Any:
    function = getattr(torch._C._VariableFunctions, name)
    if torch.is_grad_enabled() or not torch._C._autograd._profiler_enabled():
        return function(*args)
    with torch.profiler.record_function(f"aten::{name}"):
        torch._C._autograd._enable_record_function(False)
        try:
            return function(*args)
        finally:
            torch._C._autograd._enable_record_function(True)


def note_part(part: Part) -> None:
    """Tell the recorder that a part of the step begins."""
    _note(_MARK + part)


def _note(name: str) -> None:
    with torch.profiler.record_function(name):
        pass


def _recordings(events: Any, *, on_device: bool) -> list[Recording]:
    """Cut the profiler's events into steps."""
    host, device = [], []
    for event in events:
        kind = str(event.device_type).rpartition(".")[2]
        if kind == "CPU":
            host.append(event)
        elif not event.name.startswith(("suanli.", "ProfilerStep")):
            device.append(event)
    starts = [e for e in host if e.name == _STEP]
    ends = [e for e in host if e.name == _END]
    spans = [e for e in host if e.name.startswith(_COLLECTIVES)]
    host = [e for e in host if not e.name.startswith(_COLLECTIVES)]
    tops = sorted((e for e in host if _is_top(e)), key=lambda e: e.time_range.start)
    found = []
    for start, end in zip(starts, ends, strict=True):
        zero, last = start.time_range.end, end.time_range.start
        within = [e for e in tops if zero <= e.time_range.start < last]
        mine = [e for top in within for e in _opened(top)]
        marks = [e for e in mine if e.name.startswith(_MARK)]
        parts = _parts(marks, zero, last)
        roots: list[Node] = []
        aside: list[Node] = []
        for event in mine:
            if event.name.startswith("suanli."):
                continue
            here = event.thread == start.thread
            part = _part_at(parts, (event.time_range.start - zero) / 1e3)
            engine = on_device and part == "backward"
            (roots if here or engine else aside).append(_node(event, zero, part))
        sent = [_kernel(e, zero) for e in spans if zero <= e.time_range.start < last]
        ran = [_kernel(e, zero) for e in device if zero <= e.time_range.start < last]
        found.append(
            Recording(
                ms=(last - zero) / 1e3,
                parts=parts,
                roots=tuple(roots),
                aside=tuple(aside),
                device=tuple(sorted(ran, key=lambda k: k.start_ms)),
                exchanges=tuple(sent),
            )
        )
    return found


def _is_top(event: Any) -> bool:
    return event.cpu_parent is None


def _opened(event: Any) -> list[Any]:
    """The call itself, or what is in it where a part of the step begins inside.

    An optimiser's hooks run inside of what the profiler shows as its step.
    """
    if not _has_mark(event):
        return [event]
    return [inner for child in event.cpu_children for inner in _opened(child)]


def _has_mark(event: Any) -> bool:
    return any(c.name.startswith(_MARK) or _has_mark(c) for c in event.cpu_children)


def _parts(marks: list[Any], zero: float, last: float) -> tuple[tuple[Part, float, float], ...]:
    begins = [(e.name.removeprefix(_MARK), (e.time_range.start - zero) / 1e3) for e in marks]
    ends = [start for _, start in begins[1:]] + [(last - zero) / 1e3]
    return tuple((part, start, end) for (part, start), end in zip(begins, ends, strict=True))


def _part_at(parts: tuple[tuple[Part, float, float], ...], at_ms: float) -> Part:
    found = parts[0][0]
    for part, start, _ in parts:
        if start > at_ms:
            break
        found = part
    return found


def _node(event: Any, zero: float, part: Part) -> Node:
    children = tuple(
        _node(child, zero, part)
        for child in event.cpu_children
        if not child.name.startswith(("suanli.", *_COLLECTIVES))
    )
    # copies between host and device and between processes are parts of the step, not operators
    kernels = getattr(event, "kernels", ())
    own = [k for k in kernels if not (moves_between(k.name) or exchanges(k.name))]
    return Node(
        name=event.name,
        start_ms=(event.time_range.start - zero) / 1e3,
        end_ms=(event.time_range.end - zero) / 1e3,
        part=part,
        children=children,
        device_ms=sum(k.duration for k in own) / 1e3 + sum(c.device_ms for c in children),
        kernels=(*(k.name for k in own), *(name for c in children for name in c.kernels)),
        calls=1 + sum(c.calls for c in children),
    )


def moves_between(kernel: str) -> bool:
    """Whether what ran on a device is a copy between it and the host."""
    return kernel.startswith(_MOVES_BETWEEN)


def exchanges(name: str) -> bool:
    """Whether a call or a kernel is an exchange with other processes."""
    return name.startswith((*_COLLECTIVES, "c10d::", "ncclDevKernel", "ncclKernel"))


def _kernel(event: Any, zero: float) -> KernelRun:
    return KernelRun(
        name=event.name,
        start_ms=(event.time_range.start - zero) / 1e3,
        end_ms=(event.time_range.end - zero) / 1e3,
        stream=int(getattr(event, "thread", 0) or 0),
    )
