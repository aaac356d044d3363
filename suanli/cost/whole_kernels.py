"""What a GPU runs as one kernel where the CPU, on which works are captured, runs several operators.

* The gates of an LSTM's or GRU's cell (`_thnn_fused_lstm_cell`): a dozen operators on a CPU.
* Dropout (`native_dropout`): random numbers, a division and a product on a CPU.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from suanli.base.work import Operator

_GATES = {"add", "mul", "sub", "rsub", "neg", "cat", "sigmoid", "tanh", "unsafe_split"}
# An LSTM's cell of width H reads two sums of 4 H and a state and writes two states and the gates,
# 15 H in all; its operators one by one move 34 H.
_GATE_SHARE = 15 / 34


@dataclass(frozen=True, kw_only=True)
class Part:
    """An operator's part in a kernel that does several.

    Attributes:
        share: Of the bytes that it would move by itself.
        first: Whether it stands for the kernel's start and its call.
    """

    share: float
    first: bool


def parts(operators: Sequence[Operator]) -> dict[int, Part]:
    """Operators by index that are parts of such kernels; all others are kernels of their own."""
    found: dict[int, Part] = {}
    for _, run in groupby(
        enumerate(operators), key=lambda entry: (entry[1].module, entry[1].phase)
    ):
        mine = list(run)
        found |= _gates(mine)
        found |= dict(_dropouts(mine))
    return found


def _gates(run: list[tuple[int, Operator]]) -> dict[int, Part]:
    """A cell is a run with two sigmoids and a tanh among its operators."""
    gates = [(index, _plain(op)) for index, op in run if _plain(op) in _GATES and not op.matmul]
    names = Counter(name for _, name in gates)
    if names["sigmoid"] < 2 or names["tanh"] < 1:
        return {}
    return {
        index: Part(share=_GATE_SHARE, first=place == 0) for place, (index, _) in enumerate(gates)
    }


def _dropouts(run: list[tuple[int, Operator]]) -> Iterator[tuple[int, Part]]:
    """The mask is one byte per element; product and division happen on the way."""
    for (index, op), (_, second), (_, third) in zip(run, run[1:], run[2:], strict=False):
        if [_plain(o) for o in (op, second, third)] == ["bernoulli", "div", "mul"]:
            moved = 2.25 * third.bytes_written  # one read, one write, the mask
            share = moved / max(1, op.bytes_read + op.bytes_written)
            yield index, Part(share=share, first=True)
            yield index + 1, Part(share=0.0, first=False)
            yield index + 2, Part(share=0.0, first=False)


def _plain(op: Operator) -> str:
    return op.name.removesuffix("_backward").rstrip("_")
