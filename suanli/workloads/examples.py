"""Example inputs from shapes alone."""

from collections.abc import Callable

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.workloads.record import Inputs
from suanli.workloads.reference import Shapes
from suanli.workloads.seeding import INPUT_SEED, pictures, tokens, values

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")


def from_shapes(model: nn.Module, shapes: Shapes, dtype: str = "") -> Callable[[int], Inputs]:
    """A maker of positional inputs.

    Args:
        model: Its smallest embedding bounds integer inputs; without one they are 0 or 1.
        shapes: One shape per argument, without the batch.
        dtype: Element type of all of them: float32 unless given.

    Raises:
        BadInputError: Not a type that torch's models take.
    """
    kind = dtype or "float32"
    if kind not in _FLOATS + _INTEGERS:
        raise BadInputError(
            f"unknown element type {dtype!r}", next_step=", ".join(_FLOATS + _INTEGERS)
        )
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = min(sizes, default=2)

    def make(batch: int) -> Inputs:
        return Inputs(
            args=tuple(
                example_tensor(batch, shape, kind, vocabulary=vocabulary, seed=INPUT_SEED + index)
                for index, shape in enumerate(shapes)
            )
        )

    return make


def example_tensor(
    batch: int, shape: tuple[int, ...], dtype: str, *, vocabulary: int = 2, seed: int = INPUT_SEED
) -> torch.Tensor:
    """One input [batch, *shape]: pictures for three dimensions with square sides, else noise."""
    kind: torch.dtype = getattr(torch, dtype)
    if dtype in _INTEGERS:
        flat = 1
        for size in shape:
            flat *= size
        most = min(vocabulary, 2 if dtype == "bool" else 128)
        upper = most if dtype in ("bool", "int8", "uint8") else vocabulary
        return tokens(batch, flat, upper, seed=seed).view(batch, *shape).to(kind)
    if len(shape) == 3 and shape[1] == shape[2] and shape[0] <= 4:
        return pictures(batch, shape[0], shape[1], seed=seed).to(kind)
    return values(batch, *shape, seed=seed).to(kind)
