"""The table of fused kernels that a training plan can name: one row, one file.

A row is a function `(model, plan) -> nn.Module`. What it returns computes what the model computes
and trains the model's own parameters and buffers (the same tensors), so that checkpoints, the
optimiser and evaluation go on with `model`. It raises `BadInputError` for a model that it does not
fit, and `MissingBackendError` where the machine lacks what it needs.
"""

from importlib import import_module

from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.native.library import present

KERNELS: dict[str, str] = {  # name -> "module:function"
    "fused-cnn": "suanli.training.fused:fused_cnn",
}


def put_in_place(model: nn.Module, plan: TrainPlan) -> nn.Module:
    """The model with the plan's kernels in the place of its own operators.

    Raises:
        BadInputError: There is no such row, or it does not fit the model.
    """
    for name in plan.kernels:
        if name not in KERNELS:
            known = ", ".join(KERNELS) or "none in this version"
            raise BadInputError(f"there are no kernels {name!r}", next_step=f"there are: {known}")
        module, _, function = KERNELS[name].partition(":")
        model = getattr(import_module(module), function)(model, plan)
    return model


def usable(plan: TrainPlan) -> TrainPlan:
    """The plan, without kernels that its device or this machine cannot run."""
    if not plan.kernels or (plan.kind == "cpu" and present()):
        return plan
    return plan.with_(kernels=())
