"""The table of fused kernels that a training plan can name: one row, one file.

A row has a function `(model, plan) -> nn.Module`. What it returns computes what the model computes
and trains the model's own parameters and buffers (the same tensors), so that checkpoints, the
optimiser and evaluation go on with `model`. It raises `BadInputError` for a model that it does not
fit, and `MissingBackendError` where the machine lacks what it needs. Beside it stand the decisions
of a plan that the row needs, and a function `(model) -> bool` that says, without building anything,
whether the search should try it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.native.library import present


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        make: "module:function" that puts the kernels in place.
        suits: "module:function" that looks at a model.
        kind: Of the device that they run on.
        needs: Fields of a plan.
    """

    make: str
    suits: str
    kind: str
    needs: Mapping[str, Any]


KERNELS: dict[str, Row] = {
    "fused-cnn": Row(
        make="suanli.training.fused:fused_cnn",
        suits="suanli.training.fused:suits_fused_cnn",
        kind="cpu",
        needs={"precision": "bf16", "memory_layout": "channels_last"},
    ),
    "narrow-cnn": Row(
        make="suanli.training.narrow:narrow_cnn",
        suits="suanli.training.narrow:suits_narrow_cnn",
        kind="cpu",
        needs={"precision": "fp32", "memory_layout": "contiguous"},
    ),
    "attention": Row(
        make="suanli.training.attention:own_attention",
        suits="suanli.training.attention:suits_own_attention",
        kind="cpu",
        needs={"precision": "bf16"},
    ),
}


def rows_for(model: nn.Module, device: str) -> dict[str, Mapping[str, Any]]:
    """The rows that are worth a trial for a model on a device, with what a plan needs for them."""
    kind = device.partition(":")[0]
    return {
        name: row.needs
        for name, row in KERNELS.items()
        if row.kind == kind and _found(row.suits)(model)
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
        model = _found(KERNELS[name].make)(model, plan)
    return model


def _found(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


def usable(plan: TrainPlan) -> TrainPlan:
    """The plan, without kernels that its device or this machine cannot run."""
    if not plan.kernels or (plan.kind == "cpu" and present()):
        return plan
    return plan.with_(kernels=())
