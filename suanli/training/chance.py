"""Whether code drew random numbers: what is traced once must not decide by chance."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def chance_watched() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a generator moved; they are put back at the end.

    Looked at are Python's, numpy's and torch's on the CPU.
    """
    python, numbers, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def drew() -> bool:
        return (
            random.getstate() != python
            or not _same(np.random.get_state(), numbers)
            or not torch.equal(torch.get_rng_state(), torchs)
        )

    try:
        yield drew
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(torchs)


def _same(one: Any, other: Any) -> bool:
    return one[2:] == other[2:] and bool(np.array_equal(one[1], other[1]))
