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
_BLOCKS = 8.0  # rows in work at once on one multiprocessor, for kernels that take a row a block


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
        sum_fill: Length of sum that filling and draining a tile's pipeline costs.
        cache_gain: How many times faster than memory the last cache is.
        cache_share: Part of the last cache that a kernel's data can use.
        overlap: Exponent of the norm that joins compute and memory time: 1 adds them, infinity
            takes the larger.
    """

    tile_half: float
    sum_fill: float
    cache_gain: float
    cache_share: float
    overlap: float


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
    best = None
    for rows, columns in TILES:
        tiles = batch * np.ceil(m / rows) * np.ceil(n / columns)
        harmonic = rows * columns / (rows + columns)
        keep = harmonic / (harmonic + shape.tile_half) * (64.0 + shape.tile_half) / 64.0
        split = np.clip(np.floor(machine.multiprocessors / tiles), 1.0, None)
        split = np.minimum(split, np.maximum(1.0, np.floor(k / _LONGEST_SPLIT)))
        waves = np.ceil(tiles * split / machine.multiprocessors)
        seconds = waves * 2.0 * rows * columns * (k / split + shape.sum_fill) / (per_unit * keep)
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


def rows_s(
    machine: Machine, shape: Shape, *, moved: Number, row_bytes: Number, second_read: Number
) -> Number:
    """Seconds of a pass over rows that needs each row twice (softmax, norms).

    The second read of a row is free while the rows in work fit the last cache, and costs memory
    traffic where they do not.

    Args:
        machine: What it runs on.
        shape: Efficiency by shape.
        moved: Bytes of one read and one write.
        row_bytes: Bytes of one row.
        second_read: Part of `moved` that a second read of everything is (a half where as much is
            read as written), times the part of it that goes to memory at worst.
    """
    missed = second_reads(machine, shape.cache_share, row_bytes)
    return sweep_s(machine, shape, moved=moved * (1.0 + second_read * missed))


def second_reads(machine: Machine, room: Number, row_bytes: Number) -> Number:
    """Part of the second reads that miss the last cache, of which `room` is there for the rows."""
    at_work = machine.multiprocessors * _BLOCKS * row_bytes
    return 1.0 / (1.0 + (room * np.maximum(machine.l2_bytes, 1.0) / at_work) ** 4)
