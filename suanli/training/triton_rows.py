"""Rows of the table of kernels that put the Triton operators of `suanli.kernels` in place.

They are for GPUs. Elsewhere, and without Triton, the operators compute by their reference formulas,
which is right and no faster. Unverified on a GPU.
"""

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError
from suanli.base.lazy import present
from suanli.base.train_plan import TrainPlan
from suanli.training.headless import HeadLoss, behead, last_linear
from suanli.training.loss_forms import CrossEntropyForm, Loss, cross_entropy_form
from suanli.training.twin import hooked, replace_module, twin_of
from suanli.workloads.record import Workload

# Below so many classes the logits are no large part of a step's memory traffic.
_MANY_CLASSES = 4096


class FusedNorm(nn.Module):
    """A layer norm or RMS norm over the last dimension, as one operator.

    Args:
        layer: Whose weight and bias are used.
    """

    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same, in the dtype of `x`."""
        from suanli.kernels.operators.norms import layer_norm, rms_norm

        layer = self.layer
        eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
        if isinstance(layer, nn.RMSNorm):
            return rms_norm(x, layer.weight, eps=eps)
        return layer_norm(x, layer.weight, layer.bias, eps=eps)


def fused_norm(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """A twin of the model whose layer norms and RMS norms are one operator each.

    Raises:
        BadInputError: It has none.
    """
    twin = twin_of(model)
    found = [(name, m) for name, m in twin.named_modules() if name and _fits(m)]
    if not found:
        raise BadInputError("fused-norm finds no layer norm over one dimension in this model")
    for name, layer in found:
        replace_module(twin, name, FusedNorm(layer))
    return twin


def suits_fused_norm(model: nn.Module, workload: Workload | None) -> bool:
    """Whether there is a norm that the operator computes, and Triton for it."""
    return present("triton") and any(_fits(m) for n, m in model.named_modules() if n)


def _fits(module: nn.Module) -> bool:
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or hooked(module):
        return False
    return module.weight is not None and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def fused_cross_entropy(model: nn.Module, loss: Loss, plan: TrainPlan) -> tuple[nn.Module, Loss]:
    """The model as it is, and its cross-entropy as one operator.

    Raises:
        BadInputError: The loss is not torch's mean cross-entropy.
    """
    form = cross_entropy_form(loss)
    if form is None:
        raise BadInputError("fused-cross-entropy needs a loss that is torch's mean cross-entropy")

    def fused(output: Tensor, labels: Tensor) -> Tensor:
        from suanli.kernels.operators.cross_entropy import cross_entropy

        logits, target = form.rows(output, labels)
        if logits.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64:
            return loss(output, labels)  # scores of pixels, or shares of classes
        return cross_entropy(
            *(logits, target),
            ignore_index=form.ignore_index,
            label_smoothing=form.label_smoothing,
        )

    return model, fused


def suits_fused_cross_entropy(model: nn.Module, workload: Workload | None) -> bool:
    """Whether the loss is torch's mean cross-entropy, and Triton is here."""
    return present("triton") and cross_entropy_form(workload.loss if workload else None) is not None


def fused_linear_cross_entropy(
    model: nn.Module, loss: Loss, plan: TrainPlan
) -> tuple[nn.Module, HeadLoss]:
    """A twin without its last linear layer, and that layer's cross-entropy as one operator.

    Raises:
        BadInputError: The layer has a bias, or as `headless.behead`.
    """
    head, form = last_linear(model), cross_entropy_form(loss)
    if head is not None and head[1].bias is not None:
        raise BadInputError("fused-linear-cross-entropy takes a last layer without bias")
    if form is not None and form.label_smoothing:
        raise BadInputError("fused-linear-cross-entropy takes a loss without label smoothing")
    return behead(model, loss, plan, _product)


def suits_fused_linear_cross_entropy(model: nn.Module, workload: Workload | None) -> bool:
    """Whether the last layer and the loss are ones that the operator takes, and large."""
    head, form = last_linear(model), cross_entropy_form(workload.loss if workload else None)
    if head is None or form is None or not present("triton"):
        return False
    large = head[1].bias is None and head[1].out_features >= _MANY_CLASSES
    return large and not form.label_smoothing and form.takes_rows()


def _product(x: Tensor, layer: nn.Linear, target: Tensor, form: CrossEntropyForm) -> Tensor:
    from suanli.kernels.operators.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, layer.weight, target, ignore_index=form.ignore_index)
