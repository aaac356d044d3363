"""A step that several processes take together: they stay in step, and their waiting is measured."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from suanli.base.errors import BadInputError
from suanli.base.processes import world
from suanli.profiling.joining import Joined
from suanli.profiling.recording import Node, Recording, exchanges

_Span = tuple[float, float]
GoOn = Callable[[bool], bool]
T = TypeVar("T")


def as_the_first_says(device: str) -> GoOn:
    """For several: the first one's word, so that all run equally many steps.

    Args:
        device: Where a flag has to lie to be sent.
    """

    def go_on(more: bool) -> bool:
        flag: Any = torch.tensor([int(more)], device=device)
        torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())

    return go_on


def several() -> bool:
    """Whether this process belongs to a group of several."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_before_others(work: Callable[[], T]) -> T:
    """Do what keeps its result on disk: the first process by itself, then the others.

    All processes of the group have to call it.
    """
    group = torch.distributed
    if group.get_rank() > 0:
        group.barrier()
    done = work()
    if group.get_rank() == 0:
        group.barrier()
    return done


def check_alone(what: str) -> None:
    """Refuse to profile, in each of several processes, what one process would do.

    Args:
        what: What was asked for, such as "a run".

    Raises:
        BadInputError: torchrun started several processes.
    """
    if world() > 1:
        raise BadInputError(
            f"{what} is profiled in one process, and torchrun started {world()}",
            next_step="leave torchrun out, or give one step of your own loop: "
            "suanli.profile(step, model=model) in every process",
        )


def takes_part(recording: Recording) -> bool:
    """Whether a recorded step exchanges anything with other processes."""
    return bool(recording.exchanges) or any(map(_exchanges, recording.roots))


def _exchanges(node: Node) -> bool:
    return exchanges(node.name) or any(map(_exchanges, node.children))


def waited_ms(recording: Recording, joined: Sequence[Joined]) -> float:
    """Milliseconds in which an exchange went on and nothing was computed.

    What is exchanged while operators run costs the step nothing. Loading is left out: a step that
    waits there waits for its batch.

    Args:
        recording: One step.
        joined: Its calls.
    """
    if recording.device:
        spans = [(k.start_ms, k.end_ms) for k in recording.device if exchanges(k.name)]
        busy = [(k.start_ms, k.end_ms) for k in recording.device if not exchanges(k.name)]
    else:
        spans = [(k.start_ms, k.end_ms) for k in recording.exchanges]
        busy = [(j.node.start_ms, j.node.end_ms) for j in joined]
        busy += [(start, end) for part, start, end in recording.parts if part == "data"]
    within = [(max(0.0, start), min(recording.ms, end)) for start, end in spans]
    return _length([*within, *busy]) - _length(busy)


def _length(spans: Iterable[_Span]) -> float:
    """Milliseconds that are in at least one of the spans."""
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        begin = max(start, reached)
        if end > begin:
            total += end - begin
            reached = end
    return total
