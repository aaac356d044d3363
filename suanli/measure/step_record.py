"""Counts the work of one step as it really runs: real tensors, real kernels, one time slower.

Where `capture` counts the model as written, this counts what a plan makes of it: the conversions of
autocast, the operators of a fused kernel, what the user's own loop does beside the model. The
operators come in the order in which a profiler sees them, so that times can be joined to them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from suanli.base.errors import CaptureError
from suanli.base.work import Operator, Phase
from suanli.measure.capturing.places import Places
from suanli.measure.capturing.recorder import Recorder, WholeCalls
from suanli.measure.capturing.traffic import Parameters

SetPhase = Callable[[Phase | None], None]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step as it ran.

    Attributes:
        operators: In execution order.
        read_backs: Source line of each value that was taken out of a tensor, as `item` does.
    """

    operators: list[Operator]
    read_backs: list[str]


def record_step(run: Callable[[SetPhase], object], models: Sequence[nn.Module]) -> StepRecord:
    """Run one step and write down every operator below autograd, in order.

    Args:
        run: Runs the step; calls what it is handed when a phase begins, with None where what
            follows is not to be counted, as the loading of a batch.
        models: Modules whose paths the operators are to carry; the outermost of each.

    Raises:
        CaptureError: The step cannot run while it is watched, as compiled code cannot.
    """
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    places = Places()
    recorder = Recorder(Parameters(tensors), places)

    outside: list[tuple[int, int]] = []
    since: list[int] = []

    def begin(phase: Phase | None) -> None:
        if since:
            outside.append((since.pop(), len(recorder.operators)))
        if phase is None:
            since.append(len(recorder.operators))
        else:
            recorder.phase = phase

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(places.following(model))
        stack.enter_context(_slow_paths())
        try:
            with recorder, WholeCalls(recorder):
                run(begin)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CaptureError(
                f"the step cannot be watched operator by operator: {reason}",
                operator=recorder.last,
            ) from error
    begin("forward")
    left_out = {i for start, end in outside for i in range(start, end)}
    operators = [op for i, op in enumerate(recorder.operators) if i not in left_out]
    return StepRecord(operators=operators, read_backs=recorder.read_backs)


@contextmanager
def _slow_paths() -> Iterator[None]:
    """Keep the shortcut of torch's own transformer layers away, which hides their operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
