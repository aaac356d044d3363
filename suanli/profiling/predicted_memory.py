"""What the cost model expects of a step's memory, as the plan really computes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import SuanliError
from suanli.base.memory import MemoryUse
from suanli.base.plan import Plan
from suanli.base.prediction import ParallelLayout
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Work
from suanli.cost.memory import Held, memory_use
from suanli.cost.model_shape import model_shape
from suanli.measure.footprint import footprint
from suanli.predicting.subject import STATES
from suanli.profiling.own_step import update_kernel
from suanli.profiling.subjects import Example, Subject
from suanli.training.forward import recompute_blocks

# Tensors like a parameter that an update makes on the way where it is not fused, without decay.
_ON_THE_WAY = {"SGD": 0, "Adam": 2, "AdamW": 2, "RMSprop": 1, "Adagrad": 1}
_DECAYS_APART = ("AdamW",)  # straight in the parameter, without a sum with the gradient


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A forward and backward pass as the footprint takes it."""

    model: nn.Module
    args: tuple[Any, ...]
    targets: Any
    loss: Callable[..., torch.Tensor] | None
    precision: str
    autocast: bool = False


def predicted_memory(subject: Subject, work: Work) -> MemoryUse | None:
    """Memory by kind of one step of the subject, predicted; None where it cannot be followed.

    Args:
        subject: With a model and an example of its step.
        work: Of the step as written.
    """
    example, plan = subject.example, subject.plan
    if subject.model is None or example is None:
        return None
    micro, count, again = subject.batch, 1, False
    if isinstance(plan, TrainPlan):
        step = _training(subject, example, plan)
        micro, count = _micro(plan, subject.batch)
        again = plan.checkpointing
    else:
        step = _inference(subject, example, plan)
    try:
        followed = footprint(
            step.model,
            _cut(step.args, subject.batch, micro),
            example.kwargs,
            batch=micro,
            training=subject.training,
            loss=step.loss,
            targets=_cut(step.targets, subject.batch, micro),
            precision=step.precision,
            autocast=step.autocast,
            cpu=plan.device == "cpu",
            prepare=recompute_blocks if again else None,
        )
    except SuanliError:
        return None
    held = _held(subject, example)
    layout = ParallelLayout(micro_batches=count)
    low = isinstance(plan, TrainPlan) and _on_low_weights(plan)
    passes = replace(held, states=0, update_copies=0.0) if low else held
    use = memory_use(followed, model_shape(work), passes, layout=layout)
    if low:
        use = _with_masters(use, subject, held, step.model)
    return _grown(use, _bytes(step.args, step.targets) * (1 - micro / subject.batch))


def _inference(subject: Subject, example: Example, plan: Plan) -> _Step:
    runs_here = bool(subject.watched) and not subject.compiled
    return _Step(
        model=subject.watched[0] if runs_here else subject.model or nn.Identity(),
        args=_laid_out(example.args, plan),
        targets=None,
        loss=None,
        precision=plan.precision,
        autocast=bool(plan.options.get("autocast")),
    )


def _training(subject: Subject, example: Example, plan: TrainPlan) -> _Step:
    """The module that the plan put in the model's place, where it did, with its own loss."""
    model, args, loss = subject.model, example.args, example.loss
    low = _on_low_weights(plan)
    other = plan.kernels or low or plan.memory_layout == "channels_last"
    if other and subject.watched and not plan.checkpointing:
        model = subject.watched[0]
        loss = subject.stepper.forward.loss if subject.stepper is not None else loss
    if low:
        args = pytree.tree_map(_narrow, args)
        loss = _of_wide(loss)
    images = plan.kernels or plan.memory_layout == "channels_last"
    return _Step(
        model=model or nn.Identity(),
        args=tuple(map(_as_image, args)) if images else args,
        targets=example.targets,
        loss=loss,
        precision="fp32" if low else plan.precision,
    )


def _on_low_weights(plan: TrainPlan) -> bool:
    """Whether the module with bf16 weights is followed; one that is patched cannot be copied."""
    return plan.weights == "bf16" and not plan.checkpointing


def _of_wide(loss: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor] | None:
    """The loss of the output in fp32, as training takes it."""
    if loss is None:
        return None
    return lambda output, *rest: loss(output.float(), *rest)


def _narrow(leaf: Any) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.bfloat16() if floating else leaf


def _laid_out(args: tuple[Any, ...], plan: Plan) -> tuple[Any, ...]:
    return tuple(map(_as_image, args)) if plan.memory_layout == "channels_last" else args


def _as_image(tensor: Any) -> Any:
    """Fused kernels, and plans with that layout, take images channels last."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _micro(plan: TrainPlan, batch: int) -> tuple[int, int]:
    """Samples that go through the model at once, and how many times they do."""
    size = min(plan.micro_batch or batch, batch)
    return size, -(-batch // size)


def _cut(given: Any, batch: int, size: int) -> Any:
    """The first samples of a batch."""

    def head(leaf: Any) -> Any:
        has_batch = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch
        return leaf[:size] if has_batch and size < batch else leaf

    return pytree.tree_map(head, given)


def _bytes(*given: Any) -> int:
    return sum(t.nbytes for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor))


def _grown(use: MemoryUse, more: float) -> MemoryUse:
    """With the part of the batch that waits for its turn."""
    return replace(
        use,
        activations_bytes=use.activations_bytes + int(more),
        total_bytes=use.total_bytes + int(more),
    )


def _with_masters(use: MemoryUse, subject: Subject, held: Held, twin: nn.Module) -> MemoryUse:
    """A step on bf16 weights: their masters and states are in fp32, and so is the update.

    Each gradient is brought to fp32 before the next one, and the bf16 one goes then.
    """
    low = [p.nbytes for p in twin.parameters() if p.dtype is torch.bfloat16]
    others = sum(p.nbytes for p in twin.parameters() if p.dtype is not torch.bfloat16)
    whole = 2 * sum(low) + others
    states = held.states * whole
    weights = use.weights_bytes + 2 * sum(low)
    passes = use.total_bytes - use.weights_bytes
    update = whole + max([*low, int(held.update_copies * whole)], default=0)
    if passes >= update:
        return replace(
            use,
            weights_bytes=weights,
            optimizer_bytes=states,
            total_bytes=weights + states + passes,
        )
    return replace(
        use,
        weights_bytes=weights,
        gradients_bytes=whole,
        optimizer_bytes=states,
        activations_bytes=0,
        workspace_bytes=update - whole,
        total_bytes=weights + states + update,
    )


def _held(subject: Subject, example: Example) -> Held:
    """States of the optimiser and what its update makes, by the optimiser itself where known."""
    states, copies = STATES.get(example.optimizer, 0), 0.0
    plan, optimizers = subject.plan, subject.optimizers
    if isinstance(plan, TrainPlan) and optimizers:
        first = optimizers[0]
        name = type(first).__name__ if type(first).__module__.startswith("torch.optim") else ""
        states = _states(first, states) if name in _ON_THE_WAY else states
        kernel = update_kernel(first, plan.kind) if name in _ON_THE_WAY else plan.optimizer_kernel
        copies = _copies(first, name, kernel, example)
    return Held(states=states, update_copies=copies)


def _states(optimizer: torch.optim.Optimizer, usual: int) -> int:
    """State tensors per parameter, of torch's own optimisers."""
    settings = optimizer.defaults
    return {
        "SGD": int(bool(settings.get("momentum"))),
        "Adam": 2 + int(bool(settings.get("amsgrad"))),
        "AdamW": 2 + int(bool(settings.get("amsgrad"))),
        "RMSprop": 1 + int(bool(settings.get("momentum"))) + int(bool(settings.get("centered"))),
        "Adagrad": 1,
    }.get(type(optimizer).__name__, usual)


def _copies(optimizer: torch.optim.Optimizer, name: str, kernel: str, example: Example) -> float:
    """What an update makes on the way, over all gradients together."""
    if kernel == "fused":
        return 0.0
    decays = bool(optimizer.defaults.get("weight_decay", example.decay))
    summed = decays and name not in _DECAYS_APART
    made = _ON_THE_WAY.get(name, 2 if example.optimizer.startswith("adam") else 0) + summed
    if kernel == "foreach":  # lists of tensors work in what they made first
        return 1.0 if made else 0.0
    sizes = [p.nbytes for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    return float(made * max(sizes, default=0) / max(1, sum(sizes)))
