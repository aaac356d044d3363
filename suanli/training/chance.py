"""The random numbers of a run: their generators, and how plans are compared in spite of them.

A model may draw from the generators of torch, and from the global ones of Python and numpy; all of
them are seeded with a run and kept in its checkpoints.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What drops values, whatever name a model calls it by. They give the first argument back; what a
# torch without one of them does not have is left out.
_DROPPING = frozenset(
    getattr(place, name)
    for place, names in (
        (functional, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"),
        (torch, "dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout feature_dropout_"),
        (torch, "feature_alpha_dropout feature_alpha_dropout_"),
    )
    for name in names.split()
    if hasattr(place, name)
)
# function -> place of its argument "dropout_p"
_SHARE_AT = {
    functional.scaled_dot_product_attention: 4,
    functional.multi_head_attention_forward: 10,
}
# Their share comes two behind the first boolean, which says whether there are biases.
_RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))


def seed_all(number: int) -> None:
    """Seed torch's generators, on all devices, and Python's and numpy's global ones."""
    torch.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)


def generators(device: str) -> tuple[Any, ...]:
    """States of torch's generators (the CPU's, the device's), Python's and numpy's.

    Args:
        device: "cpu", for which the second one is empty, or "cuda:0", …

    Returns:
        Nested tuples of tensors and plain values, as a checkpoint can hold them.
    """
    here = torch.random.get_rng_state()
    there = torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.empty(0)
    version, words, normal = random.getstate()
    drawn: Any = np.random.get_state()
    kind, keys, *rest = drawn
    python = (version, torch.tensor(words, dtype=torch.int64), normal)
    numbers = (kind, torch.tensor(keys.astype(np.int64)), *rest)
    return here, there, python, numbers


def set_generators(state: tuple[Any, ...], device: str) -> None:
    """Go on from what `generators` gave; one that is not in it stays as it is."""
    torch.random.set_rng_state(state[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state[1], device)
    if len(state) > 2:
        (version, words, normal), (kind, keys, *rest) = state[2:]
        random.setstate((version, tuple(words.tolist()), normal))
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def dropout_off() -> AbstractContextManager[Any]:
    """Inside nothing is dropped: by layers, functions, attention or recurrent networks.

    Each plan draws other masks, by which no two of them could be compared. Torch itself hands every
    call over, so that it does not matter how a model came by a function; `torch.compile` writes
    down what is called inside. Operators that are called as `torch.ops.aten…` are not seen, nor
    what a scripted model calls.
    """
    return _NothingDropped()


class _NothingDropped(TorchFunctionMode):
    """Calls what drops values so that it drops none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPPING:
            return args[0] if args else kwargs["input"]
        if func in _RECURRENT:
            args = _replaced(args, next(i for i, a in enumerate(args) if isinstance(a, bool)) + 2)
        elif func in _SHARE_AT:
            if "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
            args = _replaced(args, _SHARE_AT[func])
        return func(*args, **kwargs)


def _replaced(args: tuple[Any, ...], share: int) -> tuple[Any, ...]:
    """Arguments with 0 in the place of a share, where there are so many."""
    return (*args[:share], 0.0, *args[share + 1 :]) if len(args) > share else args


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
