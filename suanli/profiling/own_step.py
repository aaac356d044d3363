"""Finds the parts of a step that somebody else wrote, without changing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from suanli.base.plan import Plan
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Operator
from suanli.profiling.stopwatch import Mark

_FLOATS = ("fp32", "bf16", "fp16")


class OwnStep:
    """A step of a person's own, which tells when a part begins.

    The forward pass begins at the model's first call, the backward pass at `Tensor.backward` or
    `torch.autograd.backward`, the update at an optimiser's `step`; after an update comes what
    belongs to the next batch. A step without these is all forward.

    Attributes:
        optimizers: Those that the last step stepped.
    """

    def __init__(self, step: Callable[[], object], model: nn.Module | None) -> None:
        self._step, self._model = step, model
        self.optimizers: list[Optimizer] = []

    def __call__(self, mark: Mark) -> object:
        """Run it."""
        self.optimizers = []

        def updates(optimizer: Optimizer, *_: Any) -> None:
            if all(optimizer is not known for known in self.optimizers):
                self.optimizers.append(optimizer)
            mark("optimizer")

        with ExitStack() as stack:
            if self._model is not None:
                entered = self._model.register_forward_pre_hook(lambda *_: mark("forward"))
                stack.callback(entered.remove)
            stack.enter_context(_backward_marked(mark))
            stack.callback(register_optimizer_step_pre_hook(updates).remove)
            return self._step()

    def parameters(self) -> list[torch.Tensor]:
        """What the optimisers of the last step train."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def plan_seen(self, plan: Plan | TrainPlan, operators: Sequence[Operator]) -> Plan | TrainPlan:
        """The plan with what was seen of the step: types of its products, kernel of its update.

        Args:
            plan: What is known without running it.
            operators: Of one step, as they ran.
        """
        flops = dict.fromkeys(_FLOATS, 0)
        for op in operators:
            if op.matmul and op.dtype in flops:
                flops[op.dtype] += op.flops
        precision = max(_FLOATS, key=lambda name: flops[name])
        if not flops[precision]:
            return plan
        fast = torch.get_float32_matmul_precision() != "highest"
        if precision == "fp32" and plan.device != "cpu" and fast:
            precision = "tf32"
        if isinstance(plan, Plan):
            return plan.with_(precision=precision)
        kernels = [update_kernel(optimizer, plan.kind) for optimizer in self.optimizers[:1]]
        narrow = any(p.dtype is torch.bfloat16 and p.dim() > 1 for p in self.parameters())
        return plan.with_(
            precision=precision,
            weights="bf16" if precision == "bf16" and narrow else "fp32",
            optimizer_kernel=kernels[0] if kernels else plan.optimizer_kernel,
        )


def update_kernel(optimizer: Optimizer, kind: str) -> str:
    """How an optimiser of torch's goes through its tensors: its own default differs by device.

    Args:
        optimizer: One of `torch.optim`.
        kind: "cpu" or "cuda".
    """
    if optimizer.defaults.get("fused"):
        return "fused"
    foreach = optimizer.defaults.get("foreach")
    return "foreach" if foreach or (foreach is None and kind == "cuda") else "loop"


@contextmanager
def _backward_marked(mark: Mark) -> Iterator[None]:
    """Watch the two calls that start a backward pass while a step runs."""
    plain = torch.autograd.backward

    def watched(*args: Any, **kwargs: Any) -> None:
        mark("backward")
        plain(*args, **kwargs)

    torch.autograd.backward = watched
    try:
        yield
    finally:
        torch.autograd.backward = plain
