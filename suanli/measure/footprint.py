"""Which memory a step of a model needs and when, found on fake tensors."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.memory import Footprint
from suanli.measure.capture import ModuleRun, explained, quiet_machine, scalar
from suanli.measure.capturing import fakes
from suanli.measure.capturing.inside import WholeLstm, shortcuts
from suanli.measure.capturing.lifetimes import FusedAttention, Lifetimes
from suanli.measure.capturing.places import Places
from suanli.measure.capturing.traffic import tensors_in

Loss = Callable[..., torch.Tensor]
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def footprint(  # noqa: PLR0913
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int,
    training: bool = False,
    loss: Loss | None = None,
    targets: Any = None,
    precision: str = "fp32",
    autocast: bool = False,
    cpu: bool = False,
    prepare: Callable[[nn.Module], Callable[[], None]] | None = None,
) -> Footprint:
    """Run one eager step on fake tensors and note every allocation.

    Args:
        model: A module; its weights may be real, fake or on the meta device. It is not changed.
        args: Positional example inputs. Only shapes and types are looked at.
        kwargs: Keyword example inputs.
        batch: Samples in these inputs.
        training: Forward and backward in training mode, gradients made anew; else the forward
            pass in evaluation mode, without autograd.
        loss: As in `capture`.
        targets: What the loss compares with.
        precision: "bf16" or "fp16": inference with the whole model in that type, training under
            `torch.autocast` with weights as they are. Anything else: as the model is.
        autocast: Inference in that precision is under `torch.autocast` too.
        cpu: Count what this CPU's kernels allocate, else run attention as GPUs do.
        prepare: Changes the module that runs, as a plan does; gives what takes that back.

    Returns:
        The allocations, without those that kernels make inside themselves and without the
        optimiser's.

    Raises:
        CaptureError: The model cannot run without data.
    """
    mode = fakes.new_mode()
    memo: fakes.Fakes = {}
    half = _HALVES.get(precision)
    run = ModuleRun(model, mode, memo, training=training)
    inputs = fakes.fake_inputs((tuple(args), dict(kwargs or {})), mode, memo)
    aims = fakes.fake_inputs(targets, mode, memo)
    narrowed = training or autocast
    if half is not None and not narrowed:
        with mode:
            run.cast(half)
            inputs = _cast(inputs, half)
    memo.clear()
    places = Places()
    lives = Lifetimes(places, cpu=cpu)
    lives.hold(_with_modules(run.named_tensors), "weights")
    lives.hold((("", t) for t in [*tensors_in(inputs), *tensors_in(aims)]), "activations")
    out: Any = None
    with ExitStack() as stack:
        stack.enter_context(explained(lives))
        stack.enter_context(quiet_machine())
        stack.enter_context(_no_collector())
        if prepare is not None:
            stack.callback(prepare(run.module))
        stack.enter_context(run.following(places))
        stack.enter_context(mode)
        stack.enter_context(lives)
        stack.enter_context(WholeLstm() if cpu else FusedAttention())
        if cpu:
            stack.enter_context(shortcuts(lives.scratch_between))
        with _precision(half if narrowed else None), torch.set_grad_enabled(training):
            out = run(None, places, *inputs)
            # training loops hold on to the output until the step is over, and so does this
            minimised = scalar(out, loss, aims) if training else out
        if training:
            lives.start_backward()
            minimised.backward()
            lives.name_gradients(_with_modules(run.named_parameters))
    blocks = lives.blocks()
    return Footprint(batch=batch, training=training, blocks=blocks, calls=lives.calls)


def _with_modules(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """By the path of the module, not of the tensor."""
    return ((name.rpartition(".")[0], tensor) for name, tensor in named)


def _precision(half: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype=half, enabled=half is not None)


def _cast(value: Any, half: torch.dtype) -> Any:
    def narrow(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(half) if floating else leaf

    return pytree.tree_map(narrow, value)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's collector out, so that two runs give the same lifetimes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
