"""A batch cut into pieces for several streams, and results put into fresh memory."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from suanli.base.errors import SuanliError
from suanli.base.plan import Plan

if TYPE_CHECKING:
    from suanli.base.signature import Signature


def check_split(signature: "Signature", plan: Plan) -> None:
    """Refuse a plan that cuts a batch which cannot be cut.

    Raises:
        SuanliError: The program has one batch size only, or an output that is not per sample.
    """
    if plan.streams < 1 or plan.threads < 0 or plan.sub_batch < 0:
        raise SuanliError("streams must be positive, threads and sub_batch not negative")
    if plan.streams == 1 and not plan.sub_batch:
        return
    if not signature.dynamic:
        raise SuanliError(
            f"the model takes batches of {signature.max_batch} only, so streams cannot share one"
        )
    whole = [spec.name for spec in signature.outputs if not spec.batched]
    if whole or not any(spec.batched for spec in signature.inputs):
        what = ", ".join(whole) or "the input"
        raise SuanliError(f"{what} has no batch dimension, so streams cannot share a batch")


def arrays_of(inputs: Sequence[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """The tensors as arrays on the same memory; contiguous ones cost no copy."""
    return [
        tensor.numpy()
        if not tensor.requires_grad and tensor.is_contiguous()
        else tensor.detach().contiguous().numpy()
        for tensor in inputs
    ]


def batch_of(signature: "Signature", inputs: Sequence[torch.Tensor]) -> int:
    """Samples in a call; the program's only batch where no input has the dimension."""
    for spec, tensor in zip(signature.inputs, inputs, strict=True):
        if spec.batched:
            return int(tensor.shape[0])
    return signature.max_batch


def pieces(batch: int, streams: int, sub_batch: int) -> list[tuple[int, int]]:
    """Bounds of the parts of a batch, as equal as can be.

    `sub_batch` bounds their size; without it there is one part per stream.
    """
    count = -(-batch // sub_batch) if sub_batch else min(streams, batch)
    if streams > 1 and count < streams:
        count = min(streams, batch)
    bounds = [batch * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def fresh_outputs(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], batch: int
) -> list[torch.Tensor]:
    """Memory for one call's results.

    Args:
        shapes: Sizes, -1 for the batch.
        dtypes: One per shape.
        batch: Samples in the call.
    """
    return [
        torch.empty([batch if size == -1 else size for size in shape], dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
