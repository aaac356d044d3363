"""The interface that every backend implements: one file, one row in the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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


class Runner(Protocol):
    """A built plan that can be called."""

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
