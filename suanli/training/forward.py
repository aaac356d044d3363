"""Forward and backward pass of a model under a training plan.

The model that comes in keeps its fp32 parameters and buffers; they are what the optimiser updates,
what is saved and what is judged. What the plan computes with is made beside it and shares them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Phase
from suanli.training.fp8 import fp8_products
from suanli.training.joint import JointGraph
from suanli.training.kernels import EMULATED_FP8, put_in_place
from suanli.training.losses import Loss, class_axis, counting, is_mean
from suanli.training.recipe import Tensors
from suanli.training.threads import denormals_flushed
from suanli.training.twin import refuse_hooks

OnPhase = Callable[[Phase], object]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_HALVES = (torch.bfloat16, torch.float16)
_CLOSE = 1e-3  # relative difference of two sums of the same losses
_MATRIX_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)


class Forward:
    """Computes losses and gradients as a plan says.

    Attributes:
        on_phase: Told when the forward pass begins, the backward pass, and what follows them; of a
            batch in parts for each part. For those who time a step from outside. What is one graph
            is all forward.
    """

    def __init__(self, model: nn.Module, loss: Loss, plan: TrainPlan) -> None:
        """Put the plan over a model that is on its device.

        Raises:
            BadInputError: The plan does not fit the model.
        """
        self.model, self._loss, self._plan = model, loss, plan
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        inner = _low_weights(model, self._copies) if plan.weights == "bf16" else model
        inner, self.loss = put_in_place(inner, loss, plan)
        if plan.precision == "fp8" and EMULATED_FP8 not in plan.kernels:
            inner = fp8_products(inner)
        self._undo = recompute_blocks(inner) if plan.checkpointing else _nothing
        self.call: Callable[..., Any] = inner
        # buffers of a twin that a forward may replace by new ones, which the model would not see
        self._twin = None if inner is model else inner
        self._shared = {id(buffer) for buffer in inner.buffers()}
        self._prove: Callable[..., object] | None = None
        self._joint: JointGraph | None = None
        if plan.compile_scope == "joint":
            self._joint = JointGraph(inner, self._loss_of, self._context)
        elif plan.compile != "none":
            self.call = torch.compile(inner, mode=_mode(plan))
            self._prove = getattr(self.loss, "prove", None)
            if plan.compile_scope == "step":
                self.call = inner
                self._whole = torch.compile(self._forward, mode=_mode(plan))
        self._mean: bool | None = None
        self._classes: int | None = None
        self.on_phase: OnPhase = _unheard

    def gradients(
        self,
        inputs: Tensors,
        labels: torch.Tensor,
        scale: float = 1.0,
        whole: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the batch's gradients to the parameters' `grad`; gives the loss, detached.

        Args:
            inputs: The batch, each [B, …].
            labels: [B, …].
            scale: What the loss is multiplied with before the backward pass.
            whole: Labels of the batch that these are a part of; None where they are all of it. The
                gradients and the loss are then that part of the batch's.
        """
        if self._prove is not None:
            self._look_at(inputs)
        count = int(labels.shape[0])
        whole = labels if whole is None else whole
        size = self._plan.micro_batch or count
        if whole is labels and size >= count:
            return self._one(inputs, labels, scale)
        total = torch.zeros((), device=labels.device)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            part = tuple(tensor[rows] for tensor in inputs)
            own = labels[rows]
            share = self._share(part, own, whole)
            # where nothing in it counts, a mean over nothing would be no number
            own = torch.where(share > 0, own, torch.zeros_like(own))
            total += self._one(part, own, scale, share)
        return total

    def collect(self) -> None:
        """Bring gradients of bf16 copies to the fp32 masters."""
        self.on_phase("optimizer")
        for master, low in self._copies:
            if low.grad is not None:
                master.grad = low.grad.float()
                low.grad = None

    def take_over(self) -> None:
        """Bring updated masters to their bf16 copies."""
        if self._copies:
            with torch.no_grad():
                masters, low = zip(*self._copies, strict=True)
                torch._foreach_copy_(low, masters)

    def close(self) -> None:
        """Leave the model as it was found, but for its values."""
        self._undo()

    def _one(
        self,
        inputs: Tensors,
        labels: torch.Tensor,
        scale: float,
        share: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.on_phase("forward")
        if self._joint is not None:
            factor = scale if share is None else share * scale
            found = self._joint(self._typed(inputs), labels, factor)
            return found if share is None else found * share
        whole = getattr(self, "_whole", self._forward)
        loss: torch.Tensor = whole(inputs, labels)
        if self._twin is not None:
            self._refuse_replaced(self._twin)
        if not loss.requires_grad:
            raise BadInputError(
                "the loss does not follow from the trained parameters, so there are no gradients",
                next_step="is it detached, or made by operators that torch does not derive?",
            )
        loss = loss if share is None else loss * share
        self.on_phase("backward")
        (loss * scale if scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _refuse_replaced(self, twin: nn.Module) -> None:
        """Raise where the first forward put new tensors in the place of buffers."""
        self._twin = None
        for name, buffer in twin.named_buffers():
            if id(buffer) not in self._shared:
                raise BadInputError(
                    f"forward puts a new tensor in the place of the buffer {name}, which the "
                    "plan's kernels or copies in bf16 do not keep",
                    next_step="change it in place, or use a plan without them",
                )

    def _forward(self, inputs: Tensors, labels: torch.Tensor) -> torch.Tensor:
        with self._context():
            output = self.call(*self._typed(inputs))
        return self._loss_of(output, labels)

    def _loss_of(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(_plain(output), labels)

    def _look_at(self, inputs: Tensors) -> None:
        """Let the kernels look at what they cannot see in a compiled model."""
        assert self._prove is not None
        with self._context():
            self._prove(*self._typed(tuple(part[:2].clone() for part in inputs)))
        self._prove = None

    def _context(self) -> AbstractContextManager[Any]:
        plan = self._plan
        dtype = _AUTOCAST.get(plan.precision)
        if dtype is None or plan.weights == "bf16":
            return nullcontext()
        return torch.autocast(plan.kind, dtype)

    def _typed(self, inputs: Tensors) -> Tensors:
        if self._plan.weights != "bf16":
            if self._plan.precision in _AUTOCAST:
                return inputs
            # a recipe may arrange images in bf16, which layers in fp32 do not take
            return tuple(x.float() if x.dtype in _HALVES else x for x in inputs)
        return tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)

    def _share(self, inputs: Tensors, labels: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """What a micro-batch's loss counts for: its share of a mean, all of a sum.

        A mean is over the labels that are not ignored. The number stays on the device, so that
        nobody waits for it.
        """
        if self._mean is None:
            output = self._forward_output(inputs)
            self._classes = _classes(output, labels, self._loss)
            if not bool(self._counted(labels)):
                return torch.zeros((), device=labels.device)  # such a part does not tell
            self._mean = is_mean(self._loss, output, labels)
            if self._mean and len(labels) > 1:
                self._refuse_weighted(output, labels)
        if not self._mean:
            return torch.ones((), device=labels.device)
        return self._counted(labels) / self._counted(whole).clamp(min=1)

    @torch.no_grad()
    def _refuse_weighted(self, output: torch.Tensor, labels: torch.Tensor) -> None:
        """Raise for a mean in which samples weigh by their class: parts cannot be added up."""
        total, count = 0.0, 0.0
        for rows in (slice(0, 1), slice(1, None)):
            counted = float(self._counted(labels[rows]))
            if counted:
                total += float(self._loss(output[rows], labels[rows])) * counted
                count += counted
        whole = float(self._loss(output, labels))
        if abs(total / count - whole) > _CLOSE * max(abs(whole), 1e-6):
            raise BadInputError(
                "the loss weighs its samples, so a batch cannot be split",
                next_step="use a plan with micro_batch 0 and one process",
            )

    def _counted(self, labels: torch.Tensor) -> torch.Tensor:
        if self._classes is None:
            return torch.tensor(float(labels.shape[0]), device=labels.device)
        return counting(labels, self._classes).sum().float()

    @torch.no_grad()
    def _forward_output(self, inputs: Tensors) -> torch.Tensor:
        was = self.model.training
        self.model.eval()  # the probe must not move running statistics
        try:
            # outside of autocast layers in fp32 do not take what a recipe arranged in bf16
            wide = (x.float() if x.dtype in _HALVES else x.clone() for x in inputs)
            return _plain(self.model(*wide))
        finally:
            self.model.train(was)


def _classes(output: torch.Tensor, labels: torch.Tensor, loss: Loss) -> int | None:
    """How many classes there are; None where labels are none, or it cannot be seen."""
    if labels.is_floating_point():
        return None
    try:
        return int(output.shape[class_axis(output, labels, loss)])
    except BadInputError:
        return None


def _plain(output: Any) -> torch.Tensor:
    """The output in fp32, which losses are computed in."""
    if not isinstance(output, torch.Tensor):
        raise BadInputError(
            f"the model gives a {type(output).__name__}, training needs one tensor",
            next_step="wrap the model so that its forward returns what the loss takes",
        )
    return output if output.dtype == torch.float64 else output.float()


def _mode(plan: TrainPlan) -> str | None:
    return None if plan.compile == "default" else plan.compile


def _low_weights(model: nn.Module, copies: list[tuple[nn.Parameter, nn.Parameter]]) -> nn.Module:
    """A twin with bf16 copies of the matrix weights; everything else is the model's own."""
    refuse_hooks(model, "a copy in bf16")
    memo: dict[int, Any] = {}
    matrix = [m for m in model.modules() if isinstance(m, _MATRIX_LAYERS)]
    low_ids = {id(p) for m in matrix for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) in low_ids:
            low = nn.Parameter(
                parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad
            )
            memo[id(parameter)] = low
            if parameter.requires_grad:
                copies.append((parameter, low))
        else:
            memo[id(parameter)] = parameter
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def recompute_blocks(model: nn.Module) -> Callable[[], None]:
    """Recompute the activations of each block; gives what takes that back.

    Blocks are the members of the model's module lists, or else of its outermost sequence, that have
    parameters.

    Raises:
        BadInputError: The model has no blocks, or one whose statistics would be counted twice.
    """
    lists: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        lists.extend([m for m in model.modules() if isinstance(m, nn.Sequential)][:1])
    blocks = [b for m in lists for b in m.children() if any(True for _ in b.parameters())]
    if not blocks:
        raise BadInputError("the model has no blocks whose activations could be recomputed")
    for block in blocks:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in block.modules()):
            raise BadInputError(
                "recomputing a block with batch norm would count its statistics twice"
            )
    for block in blocks:
        block.forward = _recomputed(block.forward)

    def undo() -> None:
        for block in blocks:
            vars(block).pop("forward", None)

    return undo


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def _nothing() -> None:
    return None


def _unheard(phase: Phase) -> None:
    return None


@contextmanager
def machine_as_planned(plan: TrainPlan) -> Iterator[None]:
    """Threads, allocator and the products' precision as the plan says, and as before afterwards."""
    from suanli.training._allocator import kept_memory

    threads = torch.get_num_threads()
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    if plan.threads:
        torch.set_num_threads(plan.threads)
    if plan.kind == "cuda":
        torch.set_float32_matmul_precision("high" if plan.precision != "fp32" else "highest")
        torch.backends.cudnn.allow_tf32 = plan.precision != "fp32"
    try:
        with ExitStack() as stack:
            if plan.keep_memory and plan.kind == "cpu":
                stack.enter_context(kept_memory())
            if plan.flush_denormals and plan.kind == "cpu":
                stack.enter_context(denormals_flushed())
            yield
    finally:
        torch.set_num_threads(threads)
        if plan.kind == "cuda":
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions
