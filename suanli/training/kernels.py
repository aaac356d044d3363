"""The table of fused kernels that a training plan can name: one row, one file.

A row has a function `(model, plan) -> nn.Module`, or where it computes the loss too
`(model, loss, plan) -> (nn.Module, loss)`. What it returns computes what the model computes and
trains the model's own parameters and buffers (the same tensors), so that checkpoints, the optimiser
and evaluation go on with `model`. It raises `BadInputError` for a model that it does not fit, and
`MissingBackendError` where the machine lacks what it needs. Beside it stand the decisions of a plan
that the row needs, and a function `(model, workload) -> bool` that says, without building anything,
whether the search should try it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.loss_forms import Loss
from suanli.training.native.library import present
from suanli.workloads.record import Workload


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        make: "module:function" that puts the kernels in place.
        needs: Fields of a plan.
        kind: Of the device that they are for; "" where no search offers them.
        suits: "module:function" that looks at a model and what it is trained for; "" without kind.
        loss: Whether `make` takes and gives the loss too. One such row fits into a plan.
        compiled: Whether a C compiler has to make it.
    """

    make: str
    needs: Mapping[str, Any]
    kind: str = ""
    suits: str = ""
    loss: bool = False
    compiled: bool = False


EMULATED_FP8 = "emulated-fp8"
"""The row that fp8 is held against: it only rounds to fp8, and multiplies in fp32."""

KERNELS: dict[str, Row] = {
    "fused-cnn": Row(
        make="suanli.training.fused:fused_cnn",
        suits="suanli.training.fused:suits_fused_cnn",
        kind="cpu",
        needs={"precision": "bf16", "memory_layout": "channels_last"},
        compiled=True,
    ),
    "fused-loss": Row(
        make="suanli.training.fused_loss:fused_loss",
        suits="suanli.training.fused_loss:suits_fused_loss",
        kind="cpu",
        needs={"precision": "bf16"},
        loss=True,
    ),
    EMULATED_FP8: Row(
        make="suanli.training.fp8:emulated_products",
        needs={"precision": "fp8"},
    ),
    "fused-norm": Row(
        make="suanli.training.triton_rows:fused_norm",
        suits="suanli.training.triton_rows:suits_fused_norm",
        kind="cuda",
        needs={"precision": "bf16"},
    ),
    "fused-cross-entropy": Row(
        make="suanli.training.triton_rows:fused_cross_entropy",
        suits="suanli.training.triton_rows:suits_fused_cross_entropy",
        kind="cuda",
        needs={"precision": "bf16"},
        loss=True,
    ),
    "fused-linear-cross-entropy": Row(
        make="suanli.training.triton_rows:fused_linear_cross_entropy",
        suits="suanli.training.triton_rows:suits_fused_linear_cross_entropy",
        kind="cuda",
        needs={"precision": "bf16"},
        loss=True,
    ),
    "narrow-cnn": Row(
        make="suanli.training.narrow:narrow_cnn",
        suits="suanli.training.narrow:suits_narrow_cnn",
        kind="cpu",
        needs={"precision": "fp32", "memory_layout": "contiguous"},
        compiled=True,
    ),
    "attention": Row(
        make="suanli.training.attention:own_attention",
        suits="suanli.training.attention:suits_own_attention",
        kind="cpu",
        needs={"precision": "bf16"},
        compiled=True,
    ),
}


def rows_for(
    model: nn.Module, device: str, workload: Workload | None = None
) -> dict[str, Mapping[str, Any]]:
    """The rows that are worth a trial for a model on a device, with what a plan needs for them.

    Args:
        model: What is trained.
        device: Where.
        workload: With its loss; without it rows that compute the loss are left out.

    Returns:
        What a plan needs by the names of its rows, joined by commas where two go together.
    """
    kind = device.partition(":")[0]
    found = {
        name: row
        for name, row in KERNELS.items()
        if row.kind == kind and _found(row.suits)(model, workload)
    }
    together = {
        f"{one},{other}": {**found[one].needs, **found[other].needs}
        for one in found
        for other in found
        if not found[one].loss and found[other].loss
    }
    return {**{name: row.needs for name, row in found.items()}, **together}


def put_in_place(model: nn.Module, loss: Loss, plan: TrainPlan) -> tuple[nn.Module, Loss]:
    """The model and its loss with the plan's kernels in the place of their own operators.

    Raises:
        BadInputError: There is no such row, or it does not fit the model.
    """
    for name in plan.kernels:
        if name not in KERNELS:
            known = ", ".join(KERNELS) or "none in this version"
            raise BadInputError(f"there are no kernels {name!r}", next_step=f"there are: {known}")
        row = KERNELS[name]
        if row.loss:
            model, loss = _found(row.make)(model, loss, plan)
        else:
            model = _found(row.make)(model, plan)
    return model, loss


def _found(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


def usable(plan: TrainPlan) -> TrainPlan:
    """The plan, without kernels that its device or this machine cannot run."""
    if plan.optimizer_kernel == "native" and not (plan.kind == "cpu" and present()):
        plan = plan.with_(optimizer_kernel="fused")
    rows = [KERNELS[name] for name in plan.kernels if name in KERNELS]
    if all(row.kind == plan.kind and (present() or not row.compiled) for row in rows):
        return plan
    return plan.with_(kernels=())
