"""Distillation: a model learns from a teacher's answers beside the labels.

The loss is `(1 - share) loss(student, labels) + share T² KL(teacher / T, student / T)` (Hinton,
Vinyals and Dean, "Distilling the knowledge in a neural network", 2015). Both parts are means over
samples, or both sums where the loss is one.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.training.losses import Loss, is_mean
from suanli.training.recipe import Recipe
from suanli.workloads.record import Workload


class Taught(nn.Module):
    """A student that gives, while it is trained, the teacher's answers behind its own.

    The teacher is no part of the module: it is not trained, saved or judged.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]  # a list hides it from the module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """[B, C]; in training [B, 2 C], the teacher's logits last."""
        own: torch.Tensor = self.student(*inputs)
        if not self.training:
            return own
        with torch.no_grad():
            teacher = self._teacher[0].to(own.device)
            theirs: torch.Tensor = teacher(*inputs)
        if theirs.shape != own.shape:
            raise BadInputError(
                f"the teacher answers {list(theirs.shape[1:])}, the model {list(own.shape[1:])}"
            )
        return torch.cat([own, theirs.to(own.dtype)], dim=-1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's own, under its own names."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the student."""
        return self.student.load_state_dict(*args, **kwargs)


def distilled(
    recipe: Recipe, teacher: Workload, *, temperature: float = 4.0, share: float = 0.7
) -> Recipe:
    """The recipe with a teacher. Its loss is a mean or a sum over samples.

    Args:
        recipe: What is trained, a classifier.
        teacher: A workload with trained weights and the same inputs and classes.
        temperature: Divides both sides' logits.
        share: Of the teacher in the loss, 0 to 1.

    Raises:
        BadInputError: The teacher's weights are random, or the share is none.
    """
    if teacher.untrained:
        raise BadInputError(
            f"the teacher {teacher.name} is untrained", next_step="give its weights"
        )
    if not 0 < share <= 1 or temperature <= 0:
        raise BadInputError("the teacher's share is above 0 up to 1, its temperature above 0")
    workload = recipe.workload
    assert workload.loss is not None
    taught = replace(
        workload,
        make_model=lambda: Taught(workload.make_model(), teacher.make_model()),
        loss=_mixed(workload.loss, temperature, share),
    )
    changes = "; ".join(part for part in (recipe.changes, f"taught by {teacher.name}") if part)
    return replace(recipe, workload=taught, ref="", changes=changes)


def _mixed(loss: Loss, temperature: float, share: float) -> Loss:
    means: list[bool] = []  # once the loss was asked whether it is one

    def mixed(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if output.requires_grad is False:
            return loss(output, labels)  # in evaluation there is no teacher in the output
        own, theirs = output.chunk(2, dim=-1)
        if not means:
            means.append(is_mean(loss, own.detach(), labels))
        apart = functional.kl_div(
            functional.log_softmax(own / temperature, dim=-1),
            functional.log_softmax(theirs / temperature, dim=-1),
            reduction="batchmean" if means[0] else "sum",
            log_target=True,
        )
        return (1 - share) * loss(own, labels) + share * temperature**2 * apart

    return mixed
