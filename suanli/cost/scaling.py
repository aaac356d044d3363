"""A step spread over several cards: data, tensor and pipeline parallelism, and sharded replicas.

Everything that is hidden behind computation is only hidden as far as computation lasts.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import Link, ParallelLayout, StepPrediction
from suanli.base.work import BoundBy, Operator, Work
from suanli.cost.collective_time import Fabric, collective_s, fabric_of
from suanli.cost.gpu_rates import rates, unit_of
from suanli.cost.intervals import interval, spread_of
from suanli.cost.kernel_time import joined
from suanli.cost.parameters import Parameters, parameters
from suanli.cost.power_draw import mean_power_w
from suanli.cost.predictor import (
    host_seconds,
    how_of,
    kernel_terms,
    least_ms,
    moved_bytes,
    waiting_s,
)
from suanli.cost.rates import between, element_bytes, narrowed
from suanli.cost.work_kernels import KINDS, How, Kernels, kernels_of

_BLOCK = re.compile(r"^(.*?)\.?(\d+)(?:\.|$)")
_GRADIENT_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The repeated part of a model.

    Attributes:
        count: How many blocks follow each other.
        boundary_bytes: What passes from one to the next, at the width it was captured with.
        dtype: That width's type.
    """

    count: int
    boundary_bytes: float
    dtype: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Seconds of one micro-batch through the whole model on one tensor-parallel group."""

    forward_s: float
    backward_s: float
    ends_s: float
    update_s: float
    host_s: float
    compute_s: float
    memory_s: float
    forward_bytes: float
    backward_bytes: float
    update_bytes: float


def blocks_of(work: Work) -> Blocks:
    """Find the repeated blocks by module path: the list whose entries hold most operations.

    A model without such a list is one block.
    """
    name = _block_list(work)
    forward = [op for op in work.operators if op.phase == "forward"]
    inside = [op for op in forward if _block_of(op, name) is not None]
    last = [op for op in inside if op.matmul and op.output_shapes][-1:]
    if not last:
        return Blocks(count=1, boundary_bytes=float(work.output_bytes))
    size = prod(last[0].output_shapes[0]) * element_bytes(last[0].dtype)
    count = len({_block_of(op, name) for op in inside})
    return Blocks(count=count, boundary_bytes=size, dtype=last[0].dtype)


def _block_list(work: Work) -> str | None:
    """Path of the list of modules that does most operations; None where there is none."""
    weight: Counter[str] = Counter()
    for op in work.operators:
        found = _BLOCK.match(op.module)
        if found and op.phase == "forward":
            weight[found[1]] += op.flops
    return weight.most_common(1)[0][0] if weight else None


def _block_of(op: Operator, name: str | None) -> str | None:
    """Which entry of the list an operator belongs to; None where to none."""
    found = _BLOCK.match(op.module)
    return found[2] if found and found[1] == name else None


def predict_parallel(
    work: Work,
    gpu: GpuSheet,
    layout: ParallelLayout,
    *,
    dtype: str,
    how: How | None = None,
    fabric: Fabric | None = None,
    constants: Parameters | None = None,
) -> StepPrediction:
    """Predict one step (all micro-batches and the update) on `layout.devices` cards.

    Args:
        work: Of one micro-batch of one replica, the model unsplit, forward and backward and
            update; forward alone for inference.
        gpu: The card.
        layout: How it is spread. Tensor parallelism splits every product by columns or by sums,
            with two all-reduces a block and pass (Shoeybi et al., "Megatron-LM", 2019); stages run
            one forward and one backward in turn, with a bubble of pp - 1 micro-batches
            (Narayanan et al., "PipeDream-2BW", 2021); sharded replicas gather parameters before
            forward and backward (Rajbhandari et al., "ZeRO", 2020).
        dtype: What products run in.
        how: How it is run; eagerly and as usual in this type where None. Under autocast replicas
            exchange gradients in fp32, as their weights are, else in the type of the products;
            sharded ones keep their parts in fp32 and exchange narrow ones either way.
        fabric: How the cards are joined; the usual way where None.
        constants: Other parameters than those that ship.

    Raises:
        BadInputError: The layout makes no sense, the card cannot run the type, or the network is
            needed and unknown.
    """
    if min(layout.dp, layout.tp, layout.pp, layout.micro_batches) < 1:
        raise BadInputError("every number of a layout must be at least 1")
    p = constants or parameters()
    fabric = fabric or (fabric_of(gpu) if layout.devices > 1 else _ALONE)
    how = how or how_of(work, dtype, "eager", autocast=None, channels_last=None)
    gradient_bytes = _GRADIENT_BYTES if how.autocast else element_bytes(dtype)
    if layout.sharded:  # replicas gather weights that are narrow already
        how = replace(how, autocast=False)
    parts = _parts(work, gpu, layout, how, p)
    blocks = blocks_of(work)
    training = parts.backward_s > 0
    again = 1.0 if layout.recompute and training else 0.0
    boundary = narrowed(blocks.boundary_bytes, blocks.dtype, between(dtype))
    passes = (2.0 if training else 1.0) + again
    tensor_s = blocks.count * 2.0 * passes
    tensor_s *= collective_s("all_reduce", boundary, layout.tp, fabric, p.links)
    device_s = parts.forward_s * (1.0 + again) + parts.backward_s
    host_s = parts.host_s * (1.0 + again / 3.0)
    through_s = device_s + waiting_s(device_s, host_s) + tensor_s
    # The stage with the head is the longest, and all others wait for it.
    ends = parts.ends_s / max(device_s, 1e-12) if layout.pp > 1 else 0.0
    stage_s = through_s * ((1.0 - ends) / layout.pp + ends)
    slots = layout.micro_batches + layout.pp - 1
    send_s = slots * (2.0 if training else 1.0) * _send_s(boundary, layout, fabric, p)
    gradients_s = 0.0
    if training:
        widths = (element_bytes(dtype), gradient_bytes)
        gradients_s = _replicas_s(work, layout, parts, fabric, p, widths=widths)
    update_s = parts.update_s / (layout.dp if layout.sharded else 1)
    total_s = slots * stage_s + send_s + gradients_s + update_s
    useful_s = layout.micro_batches * device_s / layout.pp + update_s
    communication_s = slots * tensor_s / layout.pp + send_s + gradients_s
    return _answer(work, gpu, layout, parts, (total_s, useful_s, communication_s), p, dtype=dtype)


_ALONE = Fabric(inside=Link(kind="pcie", bytes_per_s=1.0, devices=1))


def _parts(work: Work, gpu: GpuSheet, layout: ParallelLayout, how: How, p: Parameters) -> _Parts:
    kernels = _split(kernels_of(work, how), layout.tp)
    compute_s, memory_s, start_s = kernel_terms(kernels, gpu, p, how.dtype)
    seconds = joined(p.products["vector"], compute_s, memory_s) + start_s
    phases = np.array([_phase(work.operators[int(i)]) for i in kernels["operator"]])
    name = _block_list(work)
    outside = np.array(
        [_block_of(work.operators[int(i)], name) is None for i in kernels["operator"]]
    )
    sums = [float(np.sum(seconds[phases == phase])) for phase in range(3)]
    moved = moved_bytes(kernels, p)
    bytes_of = [float(np.sum(moved[phases == phase])) for phase in range(3)]
    return _Parts(
        forward_s=sums[0],
        backward_s=sums[1],
        ends_s=float(np.sum(seconds[(phases < 2) & outside])),
        update_s=sums[2] / layout.pp,
        host_s=host_seconds(kernels, gpu, p),
        compute_s=float(np.sum(compute_s)),
        memory_s=float(np.sum(memory_s)),
        forward_bytes=bytes_of[0],
        backward_bytes=bytes_of[1],
        update_bytes=bytes_of[2],
    )


def _phase(op: Operator) -> int:
    return {"forward": 0, "backward": 1, "optimizer": 2}[op.phase]


def _split(kernels: Kernels, tp: int) -> Kernels:
    """Products, attention and what follows them shared by `tp` cards.

    The longer of a product's columns and sums is cut, as column- and row-parallel layers do by
    turns; attention by heads. Norms are repeated on every card.
    """
    if tp == 1:
        return kernels
    columns = dict(kernels.columns)
    kind = columns["kind"].astype(int)
    product = kind == KINDS.index("product")
    heads = kind == KINDS.index("attention")
    by_sum = product & (columns["k"] > columns["n"])
    by_column = product & ~by_sum
    columns["k"] = np.where(by_sum, columns["k"] / tp, columns["k"])
    columns["n"] = np.where(by_column, columns["n"] / tp, columns["n"])
    batched = product & (columns["batch"] > 1)
    columns["batch"] = np.where(heads | batched, columns["batch"] / tp, columns["batch"])
    repeated = kind == KINDS.index("rows")
    columns["moved"] = np.where(repeated, columns["moved"], columns["moved"] / tp)
    return replace(kernels, columns=columns)


def _send_s(n_bytes: float, layout: ParallelLayout, fabric: Fabric, p: Parameters) -> float:
    """Seconds from a stage to the next.

    Beyond one server the next stage of some is in another one, and all wait for the slowest; there
    each card of a tensor-parallel group sends its part, and the group gathers the parts (Narayanan
    et al., "Efficient large-scale language model training on GPU clusters", 2021).
    """
    if layout.pp == 1:
        return 0.0
    server = fabric.inside.devices
    if layout.devices <= server:
        return collective_s("send_recv", n_bytes, layout.tp * 2, fabric, p.links)
    sent = collective_s("send_recv", n_bytes / layout.tp, 2, fabric, p.links, apart=server)
    return sent + collective_s("all_gather", n_bytes, layout.tp, fabric, p.links)


def _replicas_s(
    work: Work,
    layout: ParallelLayout,
    parts: _Parts,
    fabric: Fabric,
    p: Parameters,
    *,
    widths: tuple[float, float],
) -> float:
    """Seconds that keeping replicas equal adds to a step, beyond what computation hides.

    Tensor-parallel groups fill servers first, so that the same part of two replicas is `tp` apart.
    `widths` are bytes of an element of gathered weights and of a whole replica's gradients.
    """
    if layout.dp == 1:
        return 0.0
    mine = work.parameters / (layout.tp * layout.pp)
    backward_s = parts.backward_s / layout.pp
    forward_s = parts.forward_s / layout.pp
    (width, gradient), apart = widths, layout.tp
    if not layout.sharded:
        whole = collective_s("all_reduce", mine * gradient, layout.dp, fabric, p.links, apart=apart)
        return whole - min(p.overlap * whole, p.overlap * backward_s)
    gather = collective_s("all_gather", mine * width, layout.dp, fabric, p.links, apart=apart)
    scatter = collective_s("reduce_scatter", mine * width, layout.dp, fabric, p.links, apart=apart)
    per_micro = gather - min(p.overlap * gather, p.overlap * forward_s)
    again = gather + scatter
    per_micro += again - min(p.overlap * again, p.overlap * backward_s)
    return layout.micro_batches * per_micro


def _answer(
    work: Work,
    gpu: GpuSheet,
    layout: ParallelLayout,
    parts: _Parts,
    seconds: tuple[float, float, float],
    p: Parameters,
    *,
    dtype: str,
) -> StepPrediction:
    total_s, useful_s, communication_s = seconds
    spread, reasons = spread_of(gpu, rates(gpu, p, dtype).missing, p)
    if layout.devices > 1:
        spread = (spread**2 + (p.spread.doubling * np.log2(layout.devices)) ** 2) ** 0.5
    both = parts.compute_s + parts.memory_s
    compute_ms = 1e3 * useful_s * parts.compute_s / max(both, 1e-12)
    memory_ms = 1e3 * useful_s - compute_ms
    waiting_s = max(0.0, total_s - useful_s - communication_s)
    terms: dict[BoundBy, float] = {
        "compute": compute_ms,
        "memory": memory_ms,
        "overhead": 1e3 * waiting_s,
        "communication": 1e3 * communication_s,
    }
    flops, moved = _done(work, layout, parts)
    watts = mean_power_w(
        gpu,
        p.clock,
        flops_per_s=flops / total_s,
        bytes_per_s=moved / total_s,
        unit=unit_of(gpu, dtype),
        busy=min(1.0, useful_s / total_s),
    )
    least = least_ms(
        work,
        gpu,
        dtype=dtype,
        micro_batches=layout.micro_batches,
        state_share=1.0 / layout.dp if layout.sharded else 1.0,
    ) / (layout.tp * layout.pp)
    return StepPrediction(
        step_ms=interval(1e3 * total_s, float(spread)),
        bound_by=max(terms, key=lambda name: terms[name]),
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        overhead_ms=1e3 * waiting_s,
        communication_ms=1e3 * communication_s,
        sol_ms=least,
        operators=(),
        spread=float(spread),
        widened=reasons,
        power_w=watts,
        energy_j=None if watts is None else watts * total_s * layout.devices,
        idle_share=1.0 - useful_s / total_s,
    )


def _done(work: Work, layout: ParallelLayout, parts: _Parts) -> tuple[float, float]:
    """Operations of products and bytes moved by one card in a step.

    What is recomputed is done again; the update comes once, a part of it on each sharded replica.
    """
    again = 2.0 if layout.recompute and parts.backward_s > 0 else 1.0
    forward = sum(op.flops for op in work.operators if op.matmul and op.phase == "forward")
    flops = work.matmul_flops + (again - 1.0) * forward
    moved = layout.micro_batches * (again * parts.forward_bytes + parts.backward_bytes)
    moved += parts.update_bytes / (layout.dp if layout.sharded else 1)
    return flops * layout.micro_batches / (layout.tp * layout.pp), moved / layout.pp
