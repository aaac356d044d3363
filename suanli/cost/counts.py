"""Time of a step of which only the totals are known: operations, activations, parameters."""

from dataclasses import dataclass, replace

import numpy as np

from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.gpu_rates import rates
from suanli.cost.kernel_time import Number, joined, reach
from suanli.cost.parameters import CountParameters, Parameters
from suanli.cost.rates import element_bytes


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals of one sample, as tables of models publish them; numbers or arrays.

    Attributes:
        macs: Multiply-adds.
        activations: Elements that products and convolutions put out.
        parameters: Elements of weights.
        batch: Samples in a step.
    """

    macs: Number
    activations: Number
    parameters: Number
    batch: Number


def step_of_counts_s(
    counts: Counts,
    gpu: GpuSheet,
    p: Parameters,
    *,
    dtype: str,
    constants: CountParameters | None = None,
) -> Number:
    """Seconds of an inference step from totals alone.

    Arithmetic at a share of what large products sustain, which grows with the operations per
    activation (few operations per element mean thin products); every activation written and read
    several times by what follows it, at the bandwidth for a tensor of the usual size; starts.

    Raises:
        BadInputError: The card has no units for the type, or its sheet lacks its bandwidth.
    """
    c = constants or p.counts
    known = rates(gpu, p, dtype)
    width = element_bytes(dtype)
    macs = np.asarray(counts.macs, dtype=float)
    intensity = macs / np.maximum(counts.activations, 1.0)
    share = c.share * intensity / (intensity + c.half_intensity)
    compute_s = 2.0 * macs * counts.batch / (known.machine.flops * share)
    moved = counts.activations * counts.batch * width
    per_layer = moved / c.layers
    rate = reach(known.machine, p.products[known.unit], per_layer)
    memory_s = (c.traffic * moved + counts.parameters * width) / rate
    shape = replace(p.products[known.unit], overlap=c.overlap)
    return joined(shape, compute_s, memory_s) + c.layers * c.starts * known.machine.kernel_s
