"""Time of one kernel from its shape: matrix products, passes over rows, plain sweeps.

Every function takes numbers or numpy arrays of one length, so that the very code which predicts is
the code that is fitted. Seconds, bytes and operations throughout.

The product follows how GPU libraries compute one: the output is cut into tiles, a multiprocessor
takes one tile at a time, so time goes in whole waves of tiles over multiprocessors ("tile and wave
quantisation", NVIDIA, "Matrix Multiplication Background User's Guide"); small tiles reuse less and
run slower; short sums leave the pipeline half full; the library picks the best tile.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Number = Any  # a float or a numpy array; numpy's own types say no more

# Rows and columns of the output that one multiprocessor takes at a time.
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 32))
# Bytes that a product keeps in the accumulator, per element of the output, when a sum is split.
_PARTIAL_BYTES = 4.0
_LONGEST_SPLIT = 256.0  # shortest piece of a sum that libraries split off
_SHORT_ROW = 16384.0  # bytes; longer rows take many steps, so that the last one hardly counts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a kernel meets on a device; each a number, or an array with one entry per kernel.

    Attributes:
        flops: Operations per second that large products of this element type sustain.
        bytes_per_s: Bandwidth of the memory that large sweeps sustain.
        l2_bytes: Size of the last cache.
        multiprocessors: How many.
        kernel_s: Least time of a kernel, from its start to the start of the next.
    """

    flops: Number
    bytes_per_s: Number
    l2_bytes: Number
    multiprocessors: Number
    kernel_s: Number


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How efficiency depends on shape; see the parameter file for the meaning of each.

    Attributes:
        tile_half: Harmonic size of a tile (rows * columns / (rows + columns)) at which half of the
            sustained rate is left, because operands then come from the caches too slowly.
        unit_flops: Operations per second of one multiprocessor for which the two lengths are
            stated; both grow with the root of its rate, since faster units starve sooner.
        sum_fill: Length of sum that filling and draining a tile's pipeline costs.
        sum_slice: Sums of products run in whole slices of this length, which a tile loads at a
            time (8 on vector units and 32 on tensor units are CUTLASS's usual ones).
        cache_gain: How many times faster than memory the last cache is.
        cache_share: Part of the last cache that a kernel's data can use.
        overlap: Exponent of the norm that joins compute and memory time: 1 adds them, infinity
            takes the larger.
    """

    tile_half: float
    unit_flops: float
    sum_fill: float
    sum_slice: float
    cache_gain: float
    cache_share: float
    overlap: float


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How passes over rows depend on the length of a row.

    Attributes:
        cache_share: Part of the last cache that the rows in work can use.
        padding: Exponent of (next power of two / length): 1 if idle lanes cost their full share.
    """

    cache_share: float
    padding: float


def reach(machine: Machine, shape: Shape, working_set: Number) -> Number:
    """Bandwidth for data of this size, which the last cache may hold in part."""
    inside = shape.cache_share * machine.l2_bytes
    held = 1.0 / (1.0 + (working_set / np.maximum(inside, 1.0)) ** 2)
    return machine.bytes_per_s * (1.0 + (shape.cache_gain - 1.0) * held)


def product_terms(
    machine: Machine,
    shape: Shape,
    *,
    batch: Number,
    sizes: tuple[Number, Number, Number],
    moved: Number,
) -> tuple[Number, Number]:
    """Arithmetic and memory seconds of `batch` products [m, k] x [k, n].

    Args:
        machine: What it runs on.
        shape: Efficiency by shape.
        batch: How many products of this size one kernel does.
        sizes: m, n, k.
        moved: Bytes of operands and result, each once.
    """
    m, n, k = (np.asarray(size, dtype=float) for size in sizes)
    batch = np.asarray(batch, dtype=float)
    per_unit = machine.flops / machine.multiprocessors
    root = np.sqrt(per_unit / shape.unit_flops)
    half, fill = shape.tile_half * root, shape.sum_fill * root
    best = None
    for rows, columns in TILES:
        tiles = batch * np.ceil(m / rows) * np.ceil(n / columns)
        harmonic = rows * columns / (rows + columns)
        keep = harmonic / (harmonic + half) * (64.0 + half) / 64.0
        split = np.clip(np.floor(machine.multiprocessors / tiles), 1.0, None)
        split = np.minimum(split, np.maximum(1.0, np.floor(k / _LONGEST_SPLIT)))
        waves = np.ceil(tiles * split / machine.multiprocessors)
        seconds = waves * 2.0 * rows * columns * (k / split + fill) / (per_unit * keep)
        partial = np.where(split > 1, 2.0 * _PARTIAL_BYTES * split * batch * m * n, 0.0)
        seconds = seconds + partial / (machine.bytes_per_s * shape.cache_gain)
        best = seconds if best is None else np.minimum(best, seconds)
    return best, moved / reach(machine, shape, moved)


def joined(shape: Shape, compute_s: Number, memory_s: Number) -> Number:
    """One time from two that overlap in part."""
    p = shape.overlap
    larger = np.maximum(np.maximum(compute_s, memory_s), 1e-12)
    return larger * ((compute_s / larger) ** p + (memory_s / larger) ** p) ** (1.0 / p)


def product_s(
    machine: Machine,
    shape: Shape,
    *,
    batch: Number,
    sizes: tuple[Number, Number, Number],
    moved: Number,
) -> Number:
    """Seconds of a product, its start included; arguments as of `product_terms`."""
    terms = product_terms(machine, shape, batch=batch, sizes=sizes, moved=moved)
    return machine.kernel_s + joined(shape, *terms)


def sweep_s(machine: Machine, shape: Shape, *, moved: Number) -> Number:
    """Seconds to read and write `moved` bytes once, the kernel's start included."""
    return machine.kernel_s + moved / reach(machine, shape, moved)


def row_traffic(
    machine: Machine, rows: Rows, *, row_bytes: Number, at_once: Number, second_read: Number
) -> Number:
    """How many times its plain traffic a pass over rows costs that needs each row twice.

    Softmax and norms read a row, then read it again. The second read is free while the rows in
    work on all multiprocessors fit the last cache, and goes to memory where they do not. Rows that
    are no power of two leave lanes of the last step idle.

    Args:
        machine: What it runs on.
        rows: The two constants.
        row_bytes: Bytes of one row.
        at_once: Rows in work on one multiprocessor.
        second_read: What reading everything again adds to one read and one write.
    """
    at_work = machine.multiprocessors * at_once * row_bytes
    room = rows.cache_share * np.maximum(machine.l2_bytes, 1.0)
    missed = 1.0 / (1.0 + (room / at_work) ** 4)
    padded = 2.0 ** np.ceil(np.log2(row_bytes)) / row_bytes
    lanes = np.where(row_bytes <= _SHORT_ROW, padded**rows.padding, 1.0)
    return (1.0 + second_read * missed) * lanes
