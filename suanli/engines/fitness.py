"""Whether example inputs and labelled data fit the model: said before any work is done on them."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError
from suanli.base.signature import Signature
from suanli.engines._batch_dimension import check_first_dimensions
from suanli.engines.program import input_names
from suanli.workloads.record import Data, Inputs, Samples

_PARTS = ("train", "search", "acceptance")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_example(model: nn.Module, inputs: Inputs, *, dynamic: bool) -> None:
    """Refuse example inputs on which nothing can be found out.

    Args:
        model: Gives the names of the arguments.
        inputs: A call of it.
        dynamic: Whether the first dimension of every tensor is to be the batch.

    Raises:
        BadInputError: One holds NaN, or their first dimensions differ.
    """
    leaves = pytree.tree_leaves((tuple(inputs.args), dict(inputs.kwargs)))
    names = input_names(model, inputs)
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.isnan().any():
            raise BadInputError(
                f"the example input {name} holds NaN in {int(leaf.isnan().sum())} of "
                f"{leaf.numel()} elements",
                next_step="give inputs on which the model works",
            )
    if dynamic:
        check_first_dimensions(names, leaves)


def check_data(data: Data, metric: str | None, signature: Signature) -> None:
    """Refuse labelled data that cannot judge the model.

    Args:
        data: The three parts.
        metric: "accuracy" or "ranking_agreement".
        signature: The model's; labels judge its first output.

    Raises:
        BadInputError: A part is empty, has no labels where they are needed, or labels that name no
            class of the model.
    """
    if not signature.outputs or not signature.outputs[0].batched:
        raise BadInputError("labels judge the first output, which here is not one row per sample")
    for name in _PARTS:
        part: Samples = getattr(data, name)
        if not part.inputs or len(part) == 0:
            raise BadInputError(
                f"the {name} part of the labelled data is empty",
                next_step="leave the data out to search floating-point plans only",
            )
        lengths = {len(tensor) for tensor in part.inputs}
        if part.labels is not None:
            lengths.add(len(part.labels))
        if len(lengths) > 1:
            raise BadInputError(
                f"the {name} part has inputs and labels of different lengths: "
                f"{', '.join(map(str, sorted(lengths)))}"
            )
        if metric == "accuracy" and name != "train":
            _check_labels(part.labels, name, signature.outputs[0].shape)


def _check_labels(labels: torch.Tensor | None, part: str, shape: tuple[int, ...]) -> None:
    """Labels of one part against the shape of the first output, [batch, classes] or [batch]."""
    if labels is None:
        raise BadInputError(f"the {part} part has no labels, which accuracy needs")
    if labels.dim() != 1 or labels.dtype not in _INTEGERS:
        raise BadInputError(
            f"the labels of the {part} part must be integers of shape [n], not {labels.dtype} of "
            f"shape {list(labels.shape)}"
        )
    if len(shape) != 2:
        return
    classes = shape[1]
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise BadInputError(
                f"label {label} of the {part} part is out of range: the model answers {classes} "
                f"classes, 0 to {classes - 1}"
            )
