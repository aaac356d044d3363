"""What a run starts from: the parts of the data, and the model's first weights."""

import torch
from torch import nn

from suanli.training.recipe import Recipe
from suanli.workloads.record import Samples


def held_out_end(train: Samples, fraction: float) -> tuple[Samples, Samples | None]:
    """The training samples, and the end of the set that is held out for validation."""
    if not fraction:
        return train, None
    edge = len(train) - int(len(train) * fraction)
    parts = []
    for rows in (slice(0, edge), slice(edge, None)):
        labels = None if train.labels is None else train.labels[rows]
        parts.append(Samples(inputs=tuple(part[rows] for part in train.inputs), labels=labels))
    return parts[0], parts[1]


def starting_point(recipe: Recipe, train: Samples, seed: int) -> nn.Module:
    """The model as a run begins with it, on the CPU.

    A workload that is untrained starts from its layers' own initialisation, drawn from `seed`; one
    with weights starts from those. The recipe's own `start` has the last word.
    """
    workload = recipe.workload
    model = workload.make_model()
    if workload.untrained:
        # children first, so that a network's own rule has the last word over its layers'
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in reversed(list(model.modules())):
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
    model.requires_grad_()
    if recipe.start is not None:
        recipe.start(model, train, torch.Generator().manual_seed(seed))
    return model
