"""Memory by kind of one step on one device, from the allocations that were followed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from suanli.base.gpu_sheet import GpuSheet
from suanli.base.memory import Block, Footprint, MemoryUse
from suanli.base.prediction import ParallelLayout
from suanli.cost.allocator import held_beyond_use
from suanli.cost.model_shape import ModelShape

# What torch allocates for cuBLAS per handle: 2 x 4 MiB + 8 x 16 KiB, from compute capability 9.0 on
# 32 MiB (torch's aten/src/ATen/cuda/CublasHandlePool.cpp).
_CUBLAS_BYTES = 8 * 2**20 + 128 * 2**10
_CUBLAS_BYTES_HOPPER = 32 * 2**20
# The driver's context and the loaded kernels of torch: an assumption, from what nvidia-smi shows
# of idle processes (about 300 to 550 MiB); no GPU was at hand to measure it.
_CONTEXT_BYTES = 500 * 2**20
# Error correction takes a sixteenth of GDDR memory on professional cards: a T4 of 16 GiB reports
# 15. HBM has cells of its own for it, GeForce cards have none switched on.
_ECC_SHARE = 15 / 16
_UNCORRECTED = ("GeForce", "TITAN", "RTX", "Quadro")
# Parameters of a layer and of the next one are gathered at the same time.
_GATHERED_LAYERS = 2

_Scale = Callable[[Block], float]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a device keeps beside the step's own allocations.

    Attributes:
        states: State elements of the optimiser per parameter (2 for Adam).
        update_copies: Copies of all gradients that the update makes on the way (1 for Adam over
            lists of tensors, 0 where it is fused or one parameter follows the other).
        weight_scale: Stored weights over captured ones, for plans in eight bits.
        kv_cache_bytes: Keys and values of earlier tokens, of the whole model.
        boundary_bytes: What passes from a layer to the next, at the width that it runs in.
    """

    states: int = 0
    update_copies: float = 0.0
    weight_scale: float = 1.0
    kv_cache_bytes: int = 0
    boundary_bytes: int = 0


def memory_use(
    footprint: Footprint,
    shape: ModelShape,
    held: Held,
    *,
    layout: ParallelLayout | None = None,
    gpu: GpuSheet | None = None,
    fragmentation: bool = True,
) -> MemoryUse:
    """Bytes by kind at the step's fullest moment, on the fullest device.

    The peak is that of torch's own allocator: bytes of all live storages. In eager execution they
    live as long as Python or the backward pass holds them, which was followed call by call.
    Tensor parallelism splits weights and what the layers' products make; a stage holds its share
    of the layers, and the saved activations of as many micro-batches as it has in flight
    (Narayanan et al., 2021: at most the number of stages); sharding splits weights, gradients and
    states over the replicas and gathers two layers at a time; recomputation keeps what passes
    between layers, and one layer's own.

    Args:
        footprint: Of one micro-batch of the whole model.
        shape: The model's repeated layers.
        held: What is kept beside.
        layout: How the step is spread; None is one device.
        gpu: The card, whose context and allocator count; None is a CPU, which has neither.
        fragmentation: Whether to replay the allocator, which takes most of the time; where not,
            `fragmentation_bytes` is 0.
    """
    layout = layout or ParallelLayout()
    scale = _scales(footprint, shape, held, layout)
    extra = _in_flight(footprint, shape, held, layout)
    sizes = [int(block.size_bytes * scale(block)) for block in footprint.blocks]
    gradients = sum(s for b, s in _pairs(footprint, sizes) if b.kind == "gradients")
    # over several micro-batches gradients stay, so that they are there at the fullest moment too
    stays = gradients if layout.micro_batches > 1 else 0
    peak = _peak(footprint, sizes, skip_gradients=bool(stays))
    peak["gradients"] += stays
    peak["activations"] += extra
    peak["optimizer"] = held.states * gradients
    temporary = int(held.update_copies * gradients)
    if sum(peak.values()) < peak["weights"] + gradients + peak["optimizer"] + temporary:
        peak["activations"], peak["gradients"] = _inputs(footprint, sizes), gradients
        peak["workspace"] = temporary
    peak["workspace"] += _workspace(gpu) + _gathered(footprint, held, layout, shape)
    kv = held.kv_cache_bytes // (layout.tp * layout.pp * layout.dp)
    spare = 0
    if gpu is not None and fragmentation:
        spare = held_beyond_use(_events(footprint, sizes, peak["optimizer"]))
    context = _CONTEXT_BYTES if gpu is not None else 0
    return MemoryUse(
        weights_bytes=peak["weights"],
        gradients_bytes=peak["gradients"],
        optimizer_bytes=peak["optimizer"],
        activations_bytes=peak["activations"],
        workspace_bytes=peak["workspace"],
        kv_cache_bytes=kv,
        fragmentation_bytes=spare,
        context_bytes=context,
        total_bytes=sum(peak.values()) + kv + spare + context,
    )


def usable_bytes(gpu: GpuSheet) -> int:
    """Bytes of a card that a process can get: nominal, less error correction in GDDR memory.

    Servers' cards come with it switched on, those of workstations with it off (the sizes that
    their drivers report: 23,028 MiB of an A10's 24 GiB, 49,140 MiB of an RTX A6000's 48 GiB).
    """
    corrected = gpu.memory_kind.startswith("GDDR") and not gpu.name.startswith(_UNCORRECTED)
    return int(gpu.memory_bytes * (_ECC_SHARE if corrected else 1.0))


def _pairs(footprint: Footprint, sizes: list[int]) -> Iterator[tuple[Block, int]]:
    return zip(footprint.blocks, sizes, strict=True)


def _inputs(footprint: Footprint, sizes: list[int]) -> int:
    """Inputs stand before the step and after it."""
    return sum(s for b, s in _pairs(footprint, sizes) if b.kind == "activations" and b.born == 0)


def _peak(footprint: Footprint, sizes: list[int], *, skip_gradients: bool) -> dict[str, int]:
    """Bytes by kind when most is live."""
    now = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "workspace"), 0)
    most, best = -1, dict(now)
    total = 0
    for index, sign in happenings(footprint):
        kind = footprint.blocks[index].kind
        if skip_gradients and kind == "gradients":
            continue
        now[kind] += sign * sizes[index]
        total += sign * sizes[index]
        if total > most:
            most, best = total, dict(now)
    return best


def happenings(footprint: Footprint) -> list[tuple[int, int]]:
    """(block, 1) where one comes and (block, -1) where one goes, as it happens."""
    found = []
    for index, block in enumerate(footprint.blocks):
        found.append((block.born, 0, index))
        if block.dies is not None:
            found.append((block.dies, 1, index))
    found.sort()
    return [(index, -1 if goes else 1) for _, goes, index in found]


def _events(footprint: Footprint, sizes: list[int], states: int) -> Iterator[tuple[int, int]]:
    """The blocks as the allocator sees them, the optimiser's states first."""
    if states:
        yield -1, states
    for index, sign in happenings(footprint):
        yield (index, sizes[index]) if sign > 0 else (index, -1)


def _scales(footprint: Footprint, shape: ModelShape, held: Held, layout: ParallelLayout) -> _Scale:
    """The part of each allocation that one device has."""
    shared = layout.dp if layout.sharded else 1
    outside = _outside_share(footprint, shape) if layout.pp > 1 else 1.0

    def scale(block: Block) -> float:
        inside = shape.within(block.module) is not None
        stage = (1.0 / layout.pp) if inside else outside
        if block.kind == "weights":
            return held.weight_scale * stage / (layout.tp * shared)
        if block.kind == "gradients":
            return stage / (layout.tp * shared)
        if layout.recompute and block.saved and inside:
            return 0.0
        split = layout.tp if shape.split_by_tensor(block.module) else 1
        return ((1.0 / layout.pp) if inside and block.saved else 1.0) / split

    return scale


def _outside_share(footprint: Footprint, shape: ModelShape) -> float:
    """The part of the weights outside of the layers on the stage that has more of them."""
    weights = [block for block in footprint.blocks if block.kind == "weights"]
    inside = [
        index for index, block in enumerate(weights) if shape.within(block.module) is not None
    ]
    if not inside:
        return 1.0
    before = sum(block.size_bytes for block in weights[: inside[0]])
    after = sum(block.size_bytes for block in weights[inside[-1] + 1 :])
    return max(before, after) / (before + after) if before + after else 1.0


def _in_flight(footprint: Footprint, shape: ModelShape, held: Held, layout: ParallelLayout) -> int:
    """Saved activations beyond those of one micro-batch in the replay."""
    if not footprint.training:
        return 0
    flying = min(layout.pp, layout.micro_batches)
    saved = sum(
        block.size_bytes / (layout.tp if shape.split_by_tensor(block.module) else 1)
        for block in footprint.blocks
        if block.saved and shape.within(block.module) is not None
    )
    if not layout.recompute:
        return int(saved * (flying - 1) / layout.pp)
    kept = held.boundary_bytes * shape.layers / layout.pp * flying
    return int(kept + saved / shape.layers)


def _gathered(footprint: Footprint, held: Held, layout: ParallelLayout, shape: ModelShape) -> int:
    if not layout.sharded or layout.dp == 1:
        return 0
    weights = sum(b.size_bytes for b in footprint.blocks if b.kind == "weights")
    layers = max(shape.layers, 1)
    whole = held.weight_scale * weights / (layout.tp * layout.pp)
    return int(whole * min(1.0, _GATHERED_LAYERS / layers * layout.pp))


def _workspace(gpu: GpuSheet | None) -> int:
    if gpu is None:
        return 0
    return _CUBLAS_BYTES_HOPPER if float(gpu.compute_capability) >= 9.0 else _CUBLAS_BYTES
