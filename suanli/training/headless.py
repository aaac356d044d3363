"""A network without its last linear layer, whose product is left to the loss.

The loss of a language model is the mean cross-entropy of that layer's output, which has a row for
each position and a column for each word: the largest tensor of the step. A loss that gets the
layer's input and its weight need not have it in memory as a whole.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.loss_forms import CrossEntropyForm, Loss, cross_entropy_form
from suanli.training.twin import hooked, replace_module, twin_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


class Product(Protocol):
    """Mean cross-entropy of a linear layer."""

    def __call__(
        self, x: Tensor, layer: nn.Linear, target: Tensor, form: CrossEntropyForm
    ) -> Tensor:
        """The loss.

        Args:
            x: Inputs of the layer, [rows, width], in the dtype that the product has.
            layer: The layer, [classes, width].
            target: [rows] int64.
            form: Which targets do not count, and the smoothing.
        """


def last_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The linear layer that a model registers last, by name; None where it has none inside."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n]
    return found[-1] if found else None


def behead(
    model: nn.Module, loss: Loss, plan: TrainPlan, product: Product
) -> "tuple[nn.Module, HeadLoss]":
    """A twin of the model without its last linear layer, and the loss that belongs to it.

    Raises:
        BadInputError: The model has no such layer, or one with hooks, or the loss is not torch's
            mean cross-entropy of rows.
    """
    head, form = last_linear(model), cross_entropy_form(loss)
    if head is None:
        raise BadInputError("the model has no last linear layer that its loss could take over")
    if hooked(head[1]):
        raise BadInputError(f"{head[0]} has hooks, which a loss that takes it over would not call")
    if form is None or not form.takes_rows():
        raise BadInputError("the loss is not torch's mean cross-entropy of the outputs' rows")
    body = Headless(model, head[0])
    return body, HeadLoss(body, form, plan, product)


class Headless(nn.Module):
    """[…] -> the input of the model's last linear layer, in the place of its output.

    Args:
        model: Its parameters and buffers are shared.
        head: Name of the layer.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.body = twin_of(model)
        self.head = cast(nn.Linear, self.body.get_submodule(head))
        self._handed = _Handed()
        replace_module(self.body, head, self._handed)
        self._name = head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the last layer would have been given.

        Raises:
            BadInputError: The model does something with that layer's output.
        """
        found = self.body(*args, **kwargs)
        if torch.compiler.is_compiling():
            return found  # `prove` looks at it once
        given, self._handed.given = self._handed.given, None
        if found is not given:
            raise BadInputError(
                f"the model's output is not that of {self._name}, so its loss cannot take it over"
            )
        return found

    @torch.no_grad()
    def prove(self, *args: Any) -> None:
        """Look at a model that is to be compiled, by some of its inputs.

        Raises:
            BadInputError: As in `forward`.
        """
        was = self.training
        self.eval()  # running statistics and chance stay as they are
        try:
            self(*args)
        finally:
            self.train(was)


class _Handed(nn.Module):
    """Stands where the layer was."""

    given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.given = x
        return x


class HeadLoss:
    """The loss of a headless model: cross-entropy of the layer that it lacks."""

    def __init__(
        self, body: Headless, form: CrossEntropyForm, plan: TrainPlan, product: Product
    ) -> None:
        """Take in the parts."""
        self.prove = body.prove
        self._body, self._form, self._product = body, form, product
        self._dtype = _DTYPES.get(plan.precision)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the rows that count.

        Args:
            features: What the headless model gave, [B, …, width].
            labels: As the model's own loss takes them.
        """
        x, target = self._form.rows(features, labels)
        loss: Tensor = self._product(
            x.to(self._dtype or x.dtype), self._body.head, target, self._form
        )
        return loss
