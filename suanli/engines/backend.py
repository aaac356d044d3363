"""The interface that every backend implements: one file, one row in the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from suanli.base.plan import BackendSpec, Plan

if TYPE_CHECKING:
    import torch

    from suanli.engines.program import Program


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Time of one layer of a built plan, by the backend's own counters.

    Attributes:
        name: The backend's name of the (possibly fused) layer.
        kind: The backend's operator type.
        time_ms: Milliseconds in one call.
        precision: What it really ran in, as the backend says; "" where it does not.
        origin: Names of the captured operators or modules in it, where the backend keeps them.
    """

    name: str
    kind: str
    time_ms: float
    precision: str = ""
    origin: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BuildNote:
    """What a build has to say.

    Attributes:
        plan: The plan as it was really built, with fallbacks filled in.
        details: Short facts for the trial, such as {"onnx_opset": "20"}.
    """

    plan: Plan
    details: dict[str, str] = field(default_factory=dict)


Batch = list[np.ndarray]
Run = Callable[[Batch], list[np.ndarray]]
RESTORE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Says how much harm a quantised graph does.

    Attributes:
        harm: Gets a function that runs the graph on a flat batch, and gives the harm; such as the
            share of search samples that were right before and are wrong after.
        wish: Harm that is low enough for a plan with the usual `max_error`.
        seconds: Time to spend on finding what to put back.
        measure: What the harm is, for the build's details: "harm" in answers, or "error" in values.
        key: Names what it judges by, so that plans can share a graph; "" where none may.
    """

    harm: Callable[[Run], float]
    wish: float
    seconds: float = RESTORE_SECONDS
    measure: str = "harm"
    key: str = ""


class Runner(Protocol):
    """A built plan that can be called.

    An engine lets one call at a time into a runner, unless the runner has an attribute `concurrent`
    that is true: then any number of threads call it at once, and it answers for what they share
    (requests, buffers, thread counts of the whole process).
    """

    def __call__(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        """Compute one batch.

        Args:
            inputs: Tensors in the signature's order, CPU (or the plan's device), contiguous, in the
                signature's dtypes, first dimension a batch of at most the maximum.

        Returns:
            Outputs in the signature's order and dtypes, in memory that later calls do not touch.
        """

    def layer_times(self, inputs: "Sequence[torch.Tensor]") -> list[LayerTime]:
        """Per-layer times of one call; empty where the backend has no counters."""

    def close(self) -> None:
        """Give back what the runner holds."""


class Backend(Protocol):
    """One way to compute a program."""

    spec: BackendSpec

    def build(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None" = None,
    ) -> BuildNote:
        """Write into `folder` what `load` needs.

        Args:
            program: The captured model.
            plan: A plan of this backend.
            folder: Empty folder; everything in it ships with the engine and is hashed.
            calibration: Batches of flat inputs, for plans with calibrated activations.

        Raises:
            SuanliError: The plan cannot be built; the message says why in one line.
        """

    def load(self, program: "Program", plan: Plan, folder: Path) -> Runner:
        """Open what `build` wrote. `program` is the one of the engine that `folder` belongs to."""


@runtime_checkable
class JudgedBackend(Backend, Protocol):
    """A backend that can put operators back into a higher precision, and takes advice on which."""

    def build_judged(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None",
        judge: Judge,
    ) -> BuildNote:
        """`build`, with `judge` to say which operators go back; plans without a choice ignore it.

        Raises:
            SuanliError: The plan cannot be built; the message says why in one line.
        """
