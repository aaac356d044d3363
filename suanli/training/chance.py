"""The random numbers of a run: their generators, and how plans are compared in spite of them.

A model may draw from the generators of torch, and from the global ones of Python and numpy; all of
them are seeded with a run and kept in its checkpoints.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

ATTENTION = functional.scaled_dot_product_attention
"""Torch's own, also where `dropout_off` has put another one in its place."""

_DROPOUTS = (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
)


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


@contextmanager
def dropout_off() -> Iterator[None]:
    """Functions of `torch.nn.functional` that drop values give all of them back.

    Each plan draws other masks, by which no two of them could be compared. A model that took such a
    function out of torch's module when it was imported drops on.
    """
    kept = {name: getattr(functional, name) for name in (*_DROPOUTS, ATTENTION.__name__)}
    for name in _DROPOUTS:
        setattr(functional, name, _given_back)
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(functional, name, function)


def _given_back(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return input


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *rest: Any,
    **more: Any,
) -> torch.Tensor:
    return ATTENTION(query, key, value, attn_mask, 0.0, *rest, **more)


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
