"""What can be profiled, as one step that is run again and again: models, built plans, engines."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError, CaptureError
from suanli.base.plan import Plan
from suanli.base.train_plan import TrainPlan
from suanli.base.work import Work
from suanli.engines.backend import LayerTime
from suanli.engines.backends import backends
from suanli.engines.engine import Engine
from suanli.engines.program import Program, capture, flatten_call, unflatten_call
from suanli.measure.capture import capture as count
from suanli.profiling.own_step import OwnStep
from suanli.profiling.stopwatch import Mark, Part
from suanli.training.step import Stepper
from suanli.workloads.record import Inputs, Workload

Layers = Callable[[], list[LayerTime]]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IN_PROCESS = ("eager", "inductor")
EAGER = Plan(backend="eager", precision="fp32", options={"source": True})


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one step of a model is made of, for counting and for following its memory.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        loss: Of a training step.
        targets: What the loss compares with.
        optimizer: "sgd", "sgd-momentum", "adam" or "adamw"; "" for inference.
        decay: Whether the update adds a decay to the gradients.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[..., torch.Tensor] | None = None
    targets: torch.Tensor | None = None
    optimizer: str = ""
    decay: bool = False


@dataclass(kw_only=True)
class Subject:
    """One step, ready to run, with what is known of it.

    Attributes:
        kind: "workload", "engine" or "run".
        training: Whether the step has a backward pass.
        plan: How it is computed.
        step: Runs it once and tells when a part begins.
        first: The part that it begins with.
        model: The model as written, fp32, for counting; None for a step of the user's own.
        example: A step of it.
        watched: The modules that really run, whose paths operators carry.
        counted: Counts the work where there is no `model`.
        layers: Times by the backend's own counters, for what torch's profiler cannot look into.
        compiled: Whether torch.compile made the step, so that it cannot be watched from inside.
        conditions: Threads, allocator and modes of the plan; held while steps run.
        close: Gives back what the step holds.
        stepper: What trains, in a step of training that goes through it.
        input_bytes: Inputs of inference, which stand before the step.
        own_loader: Whether batches come from a loader of the user's own.
        own: The step, where it is one of the user's own.
        together: Whether several processes take the step, and have to run equally many.
        called_from: Line that asked for the profile, for operators that no line of the user's
            calls; "" where that is no line of a program.
        update_line: Line that makes the optimiser, or the settings by which ours is made; "" where
            neither is a line of the user's.
    """

    name: str
    kind: Literal["workload", "engine", "run"]
    training: bool
    batch: int
    plan: Plan | TrainPlan
    step: Callable[[Mark], object]
    first: Part = "forward"
    model: nn.Module | None = None
    watched: tuple[nn.Module, ...] = ()
    example: Example | None = None
    counted: Callable[[], Work | None] = lambda: None
    layers: Layers | None = None
    compiled: bool = False
    conditions: Callable[[], AbstractContextManager[Any]] = nullcontext
    close: Callable[[], None] = lambda: None
    stepper: Stepper | None = None
    input_bytes: int = 0
    own_loader: bool = False
    own: OwnStep | None = None
    together: bool = False
    called_from: str = ""
    update_line: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that a step of training steps."""
        if self.own is not None:
            return self.own.optimizers
        return [] if self.stepper is None else [self.stepper.optimizer]

    @property
    def device(self) -> str:
        """Name of the device: "cpu", "cuda:0", and so on."""
        return self.plan.device

    def run(self) -> object:
        """Run one step, of whose parts nobody hears."""
        return self.step(_unheard)

    def sync(self) -> Callable[[], object] | None:
        """What waits for the device; None where a step ends with its call."""
        if not self.device.startswith("cuda"):
            return None
        return lambda: torch.cuda.synchronize(self.device)


def _unheard(part: Part) -> None:
    return None


def inference(workload: Workload, plan: Plan, batch: int, scratch: Path) -> Subject:
    """A workload's forward pass under a plan.

    Args:
        workload: What is run.
        plan: Eager and Inductor run the user's own module in this process; other backends build.
        batch: Samples in a step.
        scratch: Folder for what a backend builds.

    Raises:
        BadInputError: The backend is unknown.
        SuanliError: The plan cannot be built.
    """
    if plan.backend in _IN_PROCESS and not plan.quantized:
        return _in_process(workload, plan, batch)
    return _built(workload, plan, batch, scratch)


def _in_process(workload: Workload, plan: Plan, batch: int) -> Subject:
    model, inputs = arranged(workload.make_model(), workload.make_inputs(batch), plan)
    compiled = plan.backend == "inductor"
    wide = plan.precision in ("fp32", "tf32") and plan.device == "cpu"  # then one copy will do
    call: Callable[..., Any] = model
    if compiled:
        call = torch.compile(model, mode=str(plan.options.get("mode", "")) or None)

    def step(mark: Mark) -> Any:
        mark("forward")
        return call(*inputs.args, **inputs.kwargs)

    return Subject(
        name=workload.name,
        kind="workload",
        training=False,
        batch=batch,
        plan=plan,
        step=step,
        model=model if wide else workload.make_model(),
        example=_example(inputs if wide else workload.make_inputs(batch)),
        watched=(model,),
        compiled=compiled,
        input_bytes=sum(
            t.nbytes
            for t in pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
            if _is_tensor(t)
        ),
        conditions=lambda: _inference_conditions(plan),
    )


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def arranged(model: nn.Module, inputs: Inputs, plan: Plan) -> tuple[nn.Module, Inputs]:
    """The module and its inputs with a plan's device, precision and layout."""
    dtype = None if plan.options.get("autocast") else _DTYPES.get(plan.precision)
    last = plan.memory_layout == "channels_last"
    model = copy.deepcopy(model).eval().to(plan.device).requires_grad_(False)
    if dtype is not None:
        model = model.to(dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def bring(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.to(plan.device)
        if dtype is not None and leaf.is_floating_point():
            leaf = leaf.to(dtype)
        if last and leaf.dim() == 4:
            return leaf.contiguous(memory_format=torch.channels_last)
        return leaf

    args, kwargs = pytree.tree_map(bring, (tuple(inputs.args), dict(inputs.kwargs)))
    return model, Inputs(args=tuple(args), kwargs=kwargs)


@contextmanager
def _inference_conditions(plan: Plan) -> Iterator[None]:
    kind, before = plan.device.partition(":")[0], torch.get_num_threads()
    autocast = bool(plan.options.get("autocast"))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if autocast:
            stack.enter_context(torch.autocast(kind, dtype=_DTYPES[plan.precision]))
        if plan.threads:
            torch.set_num_threads(plan.threads)
            stack.callback(torch.set_num_threads, before)
        yield


def _example(inputs: Inputs) -> Example:
    return Example(args=tuple(inputs.args), kwargs=dict(inputs.kwargs))


def work_of(subject: Subject) -> Work | None:
    """The work of the step as its model is written; None where it cannot be counted."""
    example = subject.example
    try:
        if subject.model is None or example is None:
            return subject.counted()
        return count(
            subject.model,
            example.args,
            example.kwargs,
            batch=subject.batch,
            training=subject.training,
            loss=example.loss,
            targets=example.targets,
            optimizer=example.optimizer or "sgd",
        )
    except CaptureError as error:
        subject.notes.append(f"the work cannot be counted: {error}")
        return None


def _built(workload: Workload, plan: Plan, batch: int, scratch: Path) -> Subject:
    table = backends()
    if plan.backend not in table:
        raise BadInputError(
            f"unknown backend {plan.backend!r} in the plan", next_step=", ".join(sorted(table))
        )
    model, inputs = workload.make_model(), workload.make_inputs(batch)
    program = capture(
        model,
        inputs,
        folder=scratch / "program",
        name=workload.name,
        ref=workload.ref,
        max_batch=batch,
        dynamic=False,
    )
    folder = scratch / "build"
    folder.mkdir(parents=True)
    backend = table[plan.backend]
    calibration = [tuple(program.inputs(batch))] if plan.quantized else None
    note = backend.build(program, plan, folder, calibration)
    runner = backend.load(program, note.plan, folder)
    flat = flatten_call(program.signature, inputs.args, dict(inputs.kwargs))
    found = Subject(
        name=workload.name,
        kind="workload",
        training=False,
        batch=batch,
        plan=note.plan,
        step=lambda mark: runner(flat),
        model=model,
        example=_example(inputs),
        layers=lambda: runner.layer_times(flat),
        conditions=torch.no_grad,
        close=runner.close,
    )
    if plan.quantized:
        found.notes.append("quantised with example inputs: the time is right, the answers are not")
    return found


def of_engine(engine: Engine, batch: int | None, inputs: Sequence[torch.Tensor] = ()) -> Subject:
    """A saved engine's call.

    Args:
        engine: Open; the caller closes it.
        batch: Samples in a step; None is what the engine was confirmed at.
        inputs: Flat inputs; by default those that the engine carries.

    Raises:
        BadInputError: The engine takes no such batch.
    """
    size = batch or min(engine.numbers.batch, engine.max_batch)
    if not 1 <= size <= engine.max_batch:
        raise BadInputError(f"{engine.name} takes batches from 1 to {engine.max_batch}, not {size}")
    flat = list(inputs) or engine.program.inputs(size)
    served = next(
        (v.plan for v in engine.manifest.variants if v.min_batch <= size <= v.max_batch),
        engine.plan,
    )
    found = Subject(
        name=engine.name,
        kind="engine",
        training=False,
        batch=size,
        plan=engine.plan if engine.portable else served,
        step=lambda mark: engine.call_flat(flat),
        counted=lambda: _program_work(engine.program, flat, size),
        layers=lambda: engine.layer_times(flat),
        conditions=torch.no_grad,
    )
    if engine.portable:
        found.notes.append("the portable plan runs here: `suanli rebuild` makes the engine anew")
    found.notes += engine.differences
    return found


def _program_work(program: Program, flat: Sequence[torch.Tensor], batch: int) -> Work | None:
    if not program.meta.exported:
        return None
    args, kwargs = unflatten_call(program.signature, flat)
    return count(program.exported, args, kwargs, batch=batch)
