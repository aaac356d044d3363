"""Joins what a profiler saw with what was counted: call for call, in the order of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from suanli.base.work import Operator, Phase
from suanli.profiling.recording import Node, Recording, exchanges, moves_between


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A counted operator that no call matches is passed over when one of the next so many does match.
_WINDOW = 12
# Calls that also run inside others' kernels: to skip counted operators for them would be rash.
_COMMON = _names("copy fill zero clone _to_copy add mul sum div sub empty zeros resize contiguous")
# Calls that move nothing and compute nothing: their time is dispatch.
_NOTHING = _names(
    """empty empty_like empty_strided new_empty new_empty_strided resize set detach alias view
    reshape _reshape_alias as_strided expand permute transpose t unsqueeze squeeze select slice
    narrow unbind split split_with_sizes chunk unflatten flatten view_as expand_as _unsafe_view
    result_type is_nonzero lift lift_fresh to type_as item _local_scalar_dense size stride
    resolve_conj resolve_neg _conj numpy_T movedim _has_same_storage_numel is_same_size
    requires_grad"""
)
_FRAMES = (
    "autograd",
    "Optimizer.",
    "enumerate(DataLoader)",
    "Torch-Compiled",
    "TorchDynamo",
    "Pregraph",
    "AOTDispatcher",
    "## Call",
    "DistributedDataParallel.",
    "torch.distributed.",
)
# Calls that compute a whole module of torch's own in inference, and the path that they stand for:
# operators are counted without these shortcuts.
_WHOLE = {
    "_transformer_encoder_layer_fwd": "transformer_encoder_layer",
    "_native_multi_head_attention": "multi_head_attention",
}
# A call whose insides take this part of its time is a frame around them.
_MOSTLY = 0.5


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A call that computes, with what it computes.

    Attributes:
        node: The call.
        operator: What was counted of it; None for what the count does not know.
        phase: Part of the step.
        module: Path of the module, of a call that was not counted its neighbour's.
        ms: Its time, without the profiler's own cost: on the device where there is one.
        source: Line of the user's, likewise.
        index: Position of `operator` among those counted; -1 without.
        beside: Other operators that the same call computes, with their positions.
    """

    node: Node
    operator: Operator | None
    phase: Phase
    module: str
    ms: float
    source: str = ""
    index: int = -1
    beside: tuple[tuple[int, Operator], ...] = ()


def plain_name(name: str) -> str:
    """A call's name as operators are called: no namespace, no in-place mark, one for attention."""
    short = name.rpartition("::")[2]
    if short.endswith("_") and not short.endswith("__"):
        short = short[:-1]
    if short.startswith("_scaled_dot_product"):
        short = "scaled_dot_product_attention" + "_backward" * short.endswith("_backward")
    return short


def join(recording: Recording, operators: Sequence[Operator]) -> list[Joined]:
    """Match the calls of a recorded step with the operators of the same step.

    Both lists are in execution order. A call that is the next operator takes it, whatever is
    inside; any other call is opened and its insides are matched. A call with nothing matched
    inside stands for itself when it computes something, as conversions do.

    Args:
        recording: One step.
        operators: As counted on the same step; those of the update are left out of the matching,
            which is one kernel in one plan and hundreds in another.
    """
    calls, counted = _turns_of_calls(recording), _turns_of_operators(operators)
    if [phase for phase, _ in calls] != [phase for phase, _ in counted]:
        calls, counted = _merged(calls), _merged(counted)
    by_turn = dict(enumerate(counted))
    found: list[Joined] = []
    for turn, (phase, roots) in enumerate(calls):
        match = by_turn.get(turn)
        expected = match[1] if match is not None and match[0] == phase else []
        state = _State(expected, on_device=bool(recording.device))
        found += [joined for root in roots for joined in _visit(root, phase, state)]
    state = _State([], on_device=bool(recording.device))
    for root in recording.roots:
        if root.part == "optimizer":
            found += _alone(root, "optimizer", state)
    return found


_Turns = list[tuple[Phase, list[Any]]]


def _turns_of_calls(recording: Recording) -> _Turns:
    """Outermost calls by pass: micro-batches go forward and backward in turn."""
    turns: _Turns = []
    for root in recording.roots:
        phase: Phase = "backward" if root.part == "backward" else "forward"
        if root.part in ("forward", "backward"):
            _append(turns, phase, root)
    return turns


def _turns_of_operators(operators: Sequence[Operator]) -> _Turns:
    turns: _Turns = []
    for index, op in enumerate(operators):
        if op.phase != "optimizer" and op.flops + op.bytes_read + op.bytes_written > 0:
            _append(turns, op.phase, (index, op))
    return turns


def _append(turns: _Turns, phase: Phase, item: object) -> None:
    if not turns or turns[-1][0] != phase:
        turns.append((phase, []))
    turns[-1][1].append(item)


def _merged(turns: _Turns) -> _Turns:
    phases = list(dict.fromkeys(phase for phase, _ in turns))
    return [(p, [item for phase, items in turns if phase == p for item in items]) for p in phases]


class _State:
    """The operators of a pass that have not been met yet.

    Attributes:
        on_device: Whether time is that of the kernels on a device.
        module: Of the operator that was met last; before the first one, of that one.
        source: Likewise.
    """

    def __init__(self, expected: list[tuple[int, Operator]], *, on_device: bool) -> None:
        self._expected, self._at, self.on_device = expected, 0, on_device
        first = expected[0][1] if expected else Operator(name="")
        self.module, self.source = first.module, first.source

    def ms(self, node: Node) -> float:
        """The call's time; a call of a device's program that starts no kernel takes none of it."""
        return node.device_ms if self.on_device else node.ms

    def take(self, name: str) -> tuple[int, Operator] | None:
        """The next operator if it has this name, or one soon after."""
        window = 1 if name in _COMMON else _WINDOW
        for place in range(self._at, min(self._at + window, len(self._expected))):
            index, operator = self._expected[place]
            if operator.name == name:
                self._at = place + 1
                self.module, self.source = operator.module, operator.source
                return index, operator
        return None

    def take_module(self, *, parent: bool) -> list[tuple[int, Operator]]:
        """All next operators of one module.

        Args:
            parent: Whether the module is the one around that of the next operator.
        """
        if self._at >= len(self._expected):
            return []
        path = self._expected[self._at][1].module
        path = path.rpartition(".")[0] if parent else path
        end = self._at
        while end < len(self._expected) and _within(self._expected[end][1].module, path):
            end += 1
        taken, self._at = self._expected[self._at : end], end
        if taken:
            self.module, self.source = path, taken[0][1].source
        return taken


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _visit(node: Node, phase: Phase, state: _State) -> list[Joined]:
    whole = plain_name(node.name)
    if whole in _WHOLE:
        every = state.take_module(parent=whole == "_transformer_encoder_layer_fwd")
        if every:
            return [_as_module(node, every, phase, state, _WHOLE[whole])]
    taken = state.take(plain_name(node.name))
    if taken is not None:
        index, operator = taken
        return [_joined(node, operator, phase, state, index)]
    inside = [found for child in node.children for found in _visit(child, phase, state)]
    if any(found.operator is not None for found in inside):
        return inside
    return _alone(node, phase, state)


def _as_module(
    node: Node, every: list[tuple[int, Operator]], phase: Phase, state: _State, name: str
) -> Joined:
    """A call that computes a module, by the largest operator in it and those beside that."""
    main = max(every, key=lambda item: (item[1].matmul, item[1].flops))
    operator = replace(main[1], name=name, module=state.module)
    joined = _joined(node, operator, phase, state, main[0])
    return replace(joined, beside=tuple(item for item in every if item is not main))


def _alone(node: Node, phase: Phase, state: _State) -> list[Joined]:
    """A call that nothing was counted for: what computes inside it, or itself."""
    name = plain_name(node.name)
    inside = [found for child in node.children for found in _alone(child, phase, state)]
    nothing = name in _NOTHING or name.startswith(_FRAMES) or exchanges(node.name)
    mostly = _MOSTLY * state.ms(node)
    if nothing or (inside and sum(state.ms(j.node) for j in inside) >= mostly):
        return inside
    return [_joined(node, None, phase, state, -1)]


def _joined(
    node: Node, operator: Operator | None, phase: Phase, state: _State, index: int
) -> Joined:
    return Joined(
        node=node,
        operator=operator,
        phase=phase,
        module=state.module,
        ms=state.ms(node),
        source=state.source,
        index=index,
    )


def brought_to(found: list[Joined], recording: Recording, step_ms: float) -> list[Joined]:
    """The same with the times that they have in an undisturbed step.

    What recording added to the step is taken out evenly, call by call. A step that was faster while
    it was recorded met another state of the machine: its times grow with the step.

    Args:
        found: Joined calls of `recording`.
        recording: The step that they are of.
        step_ms: The undisturbed step.
    """
    least = 0.1  # of the time: what is left to a call that does next to nothing
    cost_ms = max(0.0, recording.ms - step_ms) / max(1, recording.calls)
    slower = max(1.0, step_ms / recording.ms) if recording.ms > 0 else 1.0
    if recording.device:
        return found  # a device's times are its own
    return [replace(j, ms=slower * max(j.ms - cost_ms * j.node.calls, least * j.ms)) for j in found]


def transfers(recording: Recording) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of each copy between host and device."""
    for run in recording.device:
        if moves_between(run.name):
            yield run.name, run.end_ms - run.start_ms


def busy_ms(recording: Recording, start_ms: float, end_ms: float) -> float:
    """Milliseconds of a span in which the device ran something."""
    total, reached = 0.0, start_ms
    for run in recording.device:
        begin, end = max(run.start_ms, reached), min(run.end_ms, end_ms)
        if end > begin:
            total += end - begin
            reached = end
    return total
