"""Memory of one step: what is allocated when, and the sum by kind."""

from dataclasses import dataclass
from typing import Literal

MemoryKind = Literal["weights", "gradients", "optimizer", "activations", "workspace"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One allocation of a step.

    Attributes:
        kind: What it holds. Inputs and everything that lives for a while count as activations.
        size_bytes: Bytes of its elements.
        born: Number of the operator call that made it; 0 for what is there before the step.
        dies: Number of the call after which it is gone; None where it outlives the step.
        module: Path of the module that made it; "" where unknown.
        saved: Whether it was made by the forward pass and lived into the backward pass.
    """

    kind: MemoryKind
    size_bytes: int
    born: int
    dies: int | None
    module: str = ""
    saved: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Every allocation of one step, in order of birth.

    Attributes:
        batch: Samples in the step.
        training: Whether there is a backward pass.
        blocks: Weights first.
        calls: Operator calls of the step.
    """

    batch: int
    training: bool
    blocks: tuple[Block, ...]
    calls: int


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one device at the moment when the step needs most.

    Attributes:
        weights_bytes: Parameters and buffers.
        gradients_bytes: Gradients that are kept until the update.
        optimizer_bytes: States of the optimiser.
        activations_bytes: Inputs, what passes between operators and what the backward pass needs.
        workspace_bytes: Scratch space of the libraries, and of an update that is not fused.
        kv_cache_bytes: Keys and values of earlier tokens, where generation was asked for.
        fragmentation_bytes: What the caching allocator holds beyond what is in use.
        context_bytes: The driver's and the libraries' own.
        total_bytes: The sum.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    kv_cache_bytes: int
    fragmentation_bytes: int
    context_bytes: int
    total_bytes: int
