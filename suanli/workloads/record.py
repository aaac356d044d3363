"""The Workload record: model + example inputs + data + loss + quality metric + target."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

Metric = Literal["accuracy", "ranking_agreement"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arguments of one call of the model, as the model's `forward` takes them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A set of samples.

    Attributes:
        inputs: The model's tensor inputs in flat order, each [N, ...].
        labels: Class indices [N] (or [N, T] for every position), numbers to come near to, or
            None where there are no labels.
        rows: Where each of them is in the set that it was taken from, int64 [N]; None where they
            are that set.
    """

    inputs: "tuple[torch.Tensor, ...]"
    labels: "torch.Tensor | None" = None
    rows: "torch.Tensor | None" = None

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])

    def part(self, rows: "slice | torch.Tensor") -> "Samples":
        """The samples at these places; where they are read on demand, those of the part are too."""
        import torch

        labels = None if self.labels is None else self.labels[rows]
        taken = self.rows[rows] if self.rows is not None else rows
        if isinstance(taken, slice):
            taken = torch.arange(*taken.indices(len(self)))
        elif taken.dtype is torch.bool:
            taken = taken.nonzero().flatten()
        parts = tuple(part[rows] for part in self.inputs)
        return Samples(inputs=parts, labels=labels, rows=taken)

    def index(self, row: int) -> int | None:
        """Where a sample is in the set that it was taken from; None where this is that set."""
        return None if self.rows is None else int(self.rows[row])

    def head(self, count: int) -> "Samples":
        """The first so many, in memory."""
        return self.part(slice(0, count))


@dataclass(frozen=True, kw_only=True)
class Data:
    """The labelled data of a workload in three parts that share no sample.

    Attributes:
        train: What the weights were, or will be, fitted on. Its first samples calibrate.
        search: What the search may look at as often as it likes.
        acceptance: What decides, once. No search ever sees it.
        classes: Names of the classes, by index; empty where labels are no classes.
    """

    train: Samples
    search: Samples
    acceptance: Samples
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The hyper-parameters a workload is trained with as written.

    Attributes:
        optimizer: "sgd", "adam" or "adamw".
        nesterov: Whether SGD looks ahead.
        betas: Of Adam.
        clip_norm: Largest norm of all gradients together; 0 does not clip.
        schedule: "constant"; "one_cycle": up in a quarter of the steps, then down to zero;
            "cosine": up in a twentieth, then half a cosine down to a tenth.
        precision: What the matrix products run in; "bf16" means autocast with fp32 weights, and
            holds only on a device with matrix units for it.
        augmentation: Any of "shift2" (a random shift of up to so many pixels), "flip" (mirrored
            left to right) and "cutout8" (a square of that side set to 0), applied to image batches.
        validation_split: Fraction of the training samples held out, at the end of the set.
        lr_of: "PATTERN=FACTOR" for parameters that learn at so many times the rate; a parameter
            takes the first pattern that its name matches.
    """

    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 64
    epochs: int = 10
    validation_split: float = 0.0
    loader_workers: int = 0
    nesterov: bool = False
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    precision: Literal["fp32", "bf16"] = "fp32"
    augmentation: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.0
    lr_of: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be computed.

    Attributes:
        name: Short name for tables.
        ref: What `suanli.workloads.resolve` takes to make the same workload in another process;
            "" for a model that lives only in this one.
        make_model: Builds the model with its weights, in evaluation mode, on the CPU, in fp32.
            Deterministic: two calls give equal weights.
        make_inputs: Batch size -> example inputs of that many samples, from a fixed seed.
        data: Gives the labelled data, or None where there is none: `Data`, whose parts may be torch
            data sets or loaders, or training samples alone (see `workloads.given`).
        metric: How quality is judged where there is data.
        loss: `loss(output, labels)` for training, or None.
        target: Quality that a trained model is expected to reach, as a fraction.
        untrained: True where the weights are random, so that quality means nothing.
        dynamic_batch: Whether the first dimension of every tensor input is the batch.
        max_batch: Largest batch that makes sense for memory's sake.
        tolerance: Largest relative error of a quantised plan that the owner accepts without
            labels; None where labels must decide.
        training: Hyper-parameters as written, or None for inference only.
        note: One line a person should know, such as where the weights come from.
    """

    name: str
    make_model: "Callable[[], nn.Module]"
    make_inputs: Callable[[int], Inputs]
    ref: str = ""
    data: Callable[[], Any] | None = None
    metric: Metric | None = None
    loss: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None" = None
    target: float | None = None
    untrained: bool = True
    dynamic_batch: bool = True
    max_batch: int = 256
    tolerance: float | None = None
    training: TrainingSettings | None = None
    note: str = ""

    def load(self) -> Data:
        """The labelled data, in three parts.

        Raises:
            BadInputError: There is none, or it is none of the forms that are known.
        """
        from suanli.workloads.given import as_data

        return as_data(None if self.data is None else self.data())
