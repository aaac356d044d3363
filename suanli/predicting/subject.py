"""A workload as the predictor sees it: its work and its memory at any batch, without its data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from suanli.base.errors import BadInputError, CaptureError
from suanli.base.memory import Footprint
from suanli.base.work import Work
from suanli.cost.batches import footprint_at, work_at
from suanli.cost.model_shape import ModelShape, model_shape
from suanli.measure.capture import capture
from suanli.measure.footprint import footprint
from suanli.workloads.record import Inputs, Workload

# Small, and more than one: some layers refuse a batch of one, and a size of one may be broadcast.
_LOW, _HIGH = 2, 3
STATES = {"sgd": 0, "sgd-momentum": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A workload captured for prediction.

    Attributes:
        name: The workload's.
        training: Whether a step has a backward pass and an update.
        optimizer: Which update; "" for inference.
        shape: Repeated layers and heads.
        flops: Operations of one sample.
        parameters: Elements.
        work: Batch -> work of a step.
        footprint: Batch -> allocations of a step.
        fixed_batch: The one batch that the model takes, or None.
        notes: What the capture could not do as asked.
    """

    name: str
    training: bool
    optimizer: str
    shape: ModelShape
    flops: int
    parameters: int
    work: Callable[[int], Work]
    footprint: Callable[[int], Footprint]
    fixed_batch: int | None
    notes: tuple[str, ...] = ()

    def checked_batch(self, batch: int) -> int:
        """This batch.

        Raises:
            BadInputError: The model takes another one only.
        """
        if self.fixed_batch is not None and batch != self.fixed_batch:
            raise BadInputError(
                f"{self.name} takes a batch of {self.fixed_batch} only, not {batch}"
            )
        return batch


def subject(
    workload: Workload,
    *,
    training: bool,
    precision: str,
    optimizer: str = "",
    cpu: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Subject:
    """Capture a workload on tensors without data.

    The model is built on the meta device where it can be, so that seventy billion parameters need
    no memory; else as it is.

    Args:
        workload: What is to be predicted.
        training: A training step, or inference.
        precision: For the memory: see `suanli.measure.footprint`.
        optimizer: "sgd", "sgd-momentum", "adam" or "adamw"; "" takes the workload's own, else
            AdamW for models with attention and SGD with momentum for others.
        cpu: Follow memory as the CPU runs it, else as GPUs do.
        say: Told what is going on.

    Raises:
        BadInputError: The optimiser is unknown.
        CaptureError: The model cannot run without data.
    """
    if optimizer and optimizer not in STATES:
        raise BadInputError(f"unknown optimizer {optimizer!r}", next_step=", ".join(STATES))
    say(f"building {workload.name} without its weights")
    model = shape_model(workload)
    steps = _Steps(workload, model, training, optimizer or _own_optimizer(workload))
    say(f"capturing the work of {workload.name}")
    low, optimizer = _first(steps)
    fixed = None if workload.dynamic_batch else 1
    batches = (_LOW, _HIGH) if fixed is None else (fixed,)
    high = steps.work(_HIGH) if fixed is None else low
    say(f"following the memory of {workload.name}")
    prints = [steps.footprint(batch, precision, cpu) for batch in batches]
    return Subject(
        name=workload.name,
        training=training,
        optimizer=optimizer if training else "",
        shape=model_shape(low),
        flops=low.flops // low.batch,
        parameters=low.parameters,
        work=cache(lambda batch: work_at(low, high, batch)),
        footprint=cache(lambda batch: footprint_at(prints[0], prints[-1], batch)),
        fixed_batch=fixed,
        notes=tuple(steps.notes),
    )


def shape_model(workload: Workload) -> nn.Module:
    """The workload's model without the memory of its weights, where it can be built so."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are not loaded
            return workload.make_model()
    except Exception:  # it reads weights, or computes with real data while it is built
        return workload.make_model()


def _own_optimizer(workload: Workload) -> str:
    own = workload.training
    if own is None:
        return ""
    return "sgd-momentum" if own.optimizer == "sgd" and own.momentum else own.optimizer


def one_label(_inputs: Inputs, batch: int) -> torch.Tensor:
    """A class for each sample."""
    return torch.zeros(batch, dtype=torch.int64)


def label_per_position(inputs: Inputs, batch: int) -> torch.Tensor:
    """A class for each position of the first input of whole numbers."""
    for value in (*inputs.args, *inputs.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim > 1 and not value.is_floating_point():
            return torch.zeros(value.shape, dtype=torch.int64)
    return one_label(inputs, batch)


# What losses may want, in the order in which it is tried.
TARGETS = (one_label, label_per_position)


class _Steps:
    """Captures steps of one model."""

    def __init__(
        self, workload: Workload, model: nn.Module, training: bool, optimizer: str
    ) -> None:
        self._workload, self._model = workload, model
        self.training, self.optimizer = training, optimizer
        self.dynamic = workload.dynamic_batch
        self._targets: Callable[[Inputs, int], torch.Tensor] = one_label
        self._labels = training and workload.loss is not None
        self.notes: list[str] = []

    def work(self, batch: int) -> Work:
        """Of one step; where the workload's loss does not fit, of the sum of the outputs."""
        inputs = self._inputs(batch)
        if self._labels:
            for self._targets in TARGETS:
                try:
                    return self._capture(inputs, batch)
                except CaptureError:
                    continue
            self._labels = False
            self.notes.append("the workload's own loss needs data: the sum of the outputs is taken")
        return self._capture(inputs, batch)

    def footprint(self, batch: int, precision: str, cpu: bool) -> Footprint:
        inputs = self._inputs(batch)
        return footprint(
            self._model,
            inputs.args,
            inputs.kwargs,
            batch=batch,
            training=self.training,
            loss=self._workload.loss if self._labels else None,
            targets=self._targets(inputs, batch) if self._labels else None,
            precision=precision,
            cpu=cpu,
        )

    def _capture(self, inputs: Inputs, batch: int) -> Work:
        return capture(
            self._model,
            inputs.args,
            inputs.kwargs,
            batch=batch,
            training=self.training,
            loss=self._workload.loss if self._labels else None,
            targets=self._targets(inputs, batch) if self._labels else None,
            optimizer=self.optimizer or "adamw",
        )

    def _inputs(self, batch: int) -> Inputs:
        return self._workload.make_inputs(batch)


def _first(steps: _Steps) -> tuple[Work, str]:
    """The first capture, and the optimiser that it settles on."""
    batch = _LOW if steps.dynamic else 1
    low = steps.work(batch)
    if steps.optimizer:
        return low, steps.optimizer
    attention = any(op.name == "scaled_dot_product_attention" for op in low.operators)
    steps.optimizer = "adamw" if attention else "sgd-momentum"
    return (low if attention or not steps.training else steps.work(batch)), steps.optimizer
