"""Counts the work of a model, operator by operator, without computing anything.

The model runs once on fake tensors, which have shapes and types and no data, so that a model of
seventy billion parameters needs neither its memory nor its time. A recorder below autograd sees
every operator of the forward pass and of the backward pass.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.func import functional_call

from suanli.base.errors import CaptureError, SuanliError
from suanli.base.work import Work
from suanli.measure.capturing import fakes
from suanli.measure.capturing.exported import ExportedRun
from suanli.measure.capturing.lifetimes import Lifetimes
from suanli.measure.capturing.places import Places, line_of
from suanli.measure.capturing.recorder import Recorder, WholeCalls
from suanli.measure.capturing.traffic import Parameters, moved_bytes, tensors_in
from suanli.measure.capturing.updates import optimizer_step

Loss = Callable[..., torch.Tensor]
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch: int,
    training: bool = False,
    loss: Loss | None = None,
    targets: Any = None,
    optimizer: str = "sgd",
) -> Work:
    """Count the FLOPs and bytes of one step of a model.

    A multiply-add counts as two operations. Attention is counted as its matrix products whatever
    kernel would run; `flops` has the full square, `needed_flops` only the pairs that a causal
    flag leaves. Convolutions count padded positions in `flops` and not in `needed_flops`.
    Pointwise operators count one operation per output element, reductions one per input element,
    views and copies none. An operator without a rule has `counted=False`.

    Args:
        model: A module (its weights may be real, fake or on the meta device) or an exported
            program. It is not changed.
        args: Positional example inputs. Only shapes and types are looked at.
        kwargs: Keyword example inputs.
        batch: Samples in these inputs.
        training: Count forward, backward and optimiser; else the forward pass in evaluation mode.
        loss: `loss(output)`, or `loss(output, targets)` where targets are given, returning a
            scalar. Without it the output's own `loss` or the sum of its floats is used.
        targets: What the loss compares with.
        optimizer: "sgd", "sgd-momentum", "adam" or "adamw"; ignored unless training.

    Returns:
        The work of one step. Operators of the backward pass carry the module and the source line
        of the forward operator that they belong to.

    Raises:
        CaptureError: The model cannot run without data. `operator` names where it stopped.
    """
    mode = fakes.new_mode()
    memo: fakes.Fakes = {}
    runner = _runner(model, mode, memo, training=training)
    inputs = fakes.fake_inputs((tuple(args), dict(kwargs or {})), mode, memo)
    aims = fakes.fake_inputs(targets, mode, memo)
    parameters = Parameters(dict.fromkeys(runner.tensors).keys())
    places = Places()
    recorder = Recorder(parameters, places)
    out: Any = None
    with explained(recorder), quiet_machine(), runner.following(places), mode:
        with recorder, WholeCalls(recorder), torch.set_grad_enabled(training):
            out = runner(recorder, places, *inputs)
        if training:
            with recorder, WholeCalls(recorder), torch.enable_grad():
                out = scalar(out, loss, aims)
                places.fixed = None
                recorder.phase = "backward"
                out.backward()
    if training:
        trained = ((n, p) for n, p in runner.named_parameters if p.grad is not None)
        recorder.operators += optimizer_step(optimizer, trained)
    elements, size = parameters.read()
    return Work(
        operators=tuple(recorder.operators),
        batch=batch,
        parameters=sum(p.numel() for _, p in runner.named_parameters),
        parameter_bytes=parameters.stored_bytes,
        input_bytes=moved_bytes(tensors_in(inputs)) + moved_bytes(tensors_in(aims)),
        output_bytes=moved_bytes(tensors_in(out)),
        read_parameters=elements,
        read_parameter_bytes=size,
    )


class ModuleRun:
    """Runs a module on fake weights: a copy of it, or itself with its weights swapped meanwhile.

    Attributes:
        named_parameters: Its parameters by name.
        named_tensors: Its parameters and buffers by name.
    """

    def __init__(
        self, module: nn.Module, mode: FakeTensorMode, memo: fakes.Fakes, *, training: bool
    ) -> None:
        module = fakes.unwrapped(module)
        copied = fakes.fake_module(module, mode, memo)
        self._module = module if copied is None else copied
        self._swapped: dict[str, torch.Tensor] = {}
        self._training = training
        self._modes: dict[nn.Module, bool] = {}
        self._narrowed: dict[int, nn.Parameter] = {}
        if copied is None:
            stored = [*module.named_parameters(), *module.named_buffers()]
            self._swapped = {name: memo[id(tensor)] for name, tensor in stored}
            self._modes = {child: child.training for child in module.modules()}
        self.named_parameters = [
            (name, self._swapped.get(name, p)) for name, p in self._module.named_parameters()
        ]
        buffers = [(name, self._swapped.get(name, b)) for name, b in self._module.named_buffers()]
        self.named_tensors = [*self.named_parameters, *buffers]

    @property
    def module(self) -> nn.Module:
        """What runs: the copy, or the module itself."""
        return self._module

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its parameters and buffers."""
        return [tensor for _, tensor in self.named_tensors]

    def cast(self, dtype: torch.dtype) -> None:
        """Bring every floating weight to `dtype`, as `module.to(dtype)` would; in the fake mode."""
        if self._swapped:
            self._swapped = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self._swapped.items()
            }
            self.named_tensors = list(self._swapped.items())
            return
        # in place of `module.to`, which cannot swap fake tensors that something refers to
        for child in self._module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    narrow = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                    child._parameters[name] = self._narrowed.setdefault(id(parameter), narrow)
            for name, buffer in child._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    child._buffers[name] = buffer.to(dtype)
        self.named_parameters = list(self._module.named_parameters())
        self.named_tensors = [*self.named_parameters, *self._module.named_buffers()]

    @contextmanager
    def following(self, places: Places) -> Iterator[None]:
        """In the mode asked for, with its modules known by path; undone at the end."""
        if self._training != self._module.training:
            self._module.train(self._training)
        try:
            with places.following(self._module):
                yield
        finally:
            for child, mode in self._modes.items():
                child.training = mode

    def __call__(
        self,
        recorder: Recorder | None,
        places: Places,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module; `recorder` is what exported programs need and it does not."""
        if self._swapped:
            return functional_call(self._module, self._swapped, args, kwargs)
        return self._module(*args, **kwargs)


def _runner(
    model: Any, mode: FakeTensorMode, memo: fakes.Fakes, *, training: bool
) -> "ModuleRun | ExportedRun":
    if isinstance(model, ExportedProgram):
        return ExportedRun(model, mode, memo)
    if isinstance(model, nn.Module):
        return ModuleRun(model, mode, memo, training=training)
    raise CaptureError(
        f"a {type(model).__name__} cannot be captured",
        operator=type(model).__name__,
        next_step="give an nn.Module or an exported program",
    )


def scalar(out: Any, loss: Loss | None, targets: Any) -> torch.Tensor:
    """The number that is minimised.

    Raises:
        CaptureError: There is nothing to differentiate.
    """
    if loss is not None:
        value = loss(out) if targets is None else loss(out, targets)
    elif isinstance(getattr(out, "loss", None), torch.Tensor):
        value = out.loss
    else:
        parts = [t.sum() for t in tensors_in(out) if t.is_floating_point() and t.requires_grad]
        if not parts:
            raise CaptureError("no output depends on a parameter that is trained", operator="loss")
        value = parts[0]
        for part in parts[1:]:
            value = value + part
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise CaptureError(
            "the loss is no single number that depends on the parameters", operator="loss"
        )
    return value


@contextmanager
def explained(recorder: Recorder | Lifetimes) -> Iterator[None]:
    """Turn what stops a model without data into one line that names operator and source."""
    try:
        yield
    except SuanliError:
        raise
    except Exception as error:
        func = getattr(error, "func", None)
        operator = str(func) if func is not None else recorder.last
        line = line_of(error.__traceback__)
        said = str(error).strip().splitlines()
        reason = said[0][:200] if said else type(error).__name__
        if isinstance(error, _NEEDS_VALUES):
            reason = "it needs the values of its input, not only their shapes"
        where = (f" in {operator}" if operator else "") + (f" at {line}" if line else "")
        raise CaptureError(
            f"the model stops{where}: {reason}",
            operator=operator,
            next_step="plans that run it eagerly need no capture",
        ) from error


@contextmanager
def quiet_machine() -> Iterator[None]:
    """Keep fused shortcuts and compilers of torch out of the way while the model runs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.CRITICAL)  # it prints whole tracebacks of what is raised anyway
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model and of torch, about running it
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)
