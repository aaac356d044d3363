"""Characters of a text that is on every machine: the language reference inside Python's library.

`pydoc_data.topics` holds what `help("if")` and the like print: some 465,000 characters of English
and code, under Python's licence. Which ones exactly depends on the version of Python.
"""

from functools import cache

import torch

from suanli.base.errors import BadInputError
from suanli.workloads.record import Data, Samples

# printable ASCII and the line break, the same on every machine; 0 stands for all else
_KNOWN = {
    character: number
    for number, character in enumerate("\n" + "".join(map(chr, range(32, 127))), 1)
}
VOCABULARY = len(_KNOWN) + 1
_TRAIN, _SEARCH = 0.85, 0.05  # the rest is for acceptance


@cache
def read_text() -> str:
    """The text.

    Raises:
        BadInputError: This Python carries none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BadInputError(
            "this Python has no pydoc_data", next_step="install its standard library whole"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def characters_data(context: int) -> Data:
    """Windows of the text: characters [N, context] and, as labels, each one's successor.

    The three parts are stretches of the text that do not overlap. Training windows overlap by half,
    the others not at all.
    """
    numbers = torch.tensor([_KNOWN.get(character, 0) for character in read_text()])
    first, second = (int(len(numbers) * edge) for edge in (_TRAIN, _TRAIN + _SEARCH))
    return Data(
        train=_windows(numbers[:first], context, context // 2),
        search=_windows(numbers[first:second], context, context),
        acceptance=_windows(numbers[second:], context, context),
    )


def _windows(numbers: torch.Tensor, context: int, stride: int) -> Samples:
    rows = numbers.unfold(0, context + 1, stride)
    return Samples(inputs=(rows[:, :-1].contiguous(),), labels=rows[:, 1:].contiguous())
