"""Which ceilings a plan's precision may use, and how wide its elements are."""

from dataclasses import dataclass

from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceiling, Ceilings

# Bytes of one element as it lies in memory. tf32 is a way to multiply: its elements are fp32's.
_BYTES = {
    "fp64": 8.0,
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "uint8": 1.0,
    "int4": 0.5,
}

# Precisions that a plan's products may run in: its own and those that round less. A plan for fp32
# gets no credit for units that multiply in bf16; one for int8 may leave products in any float.
_MAY_USE = {
    "fp32": ("fp32",),
    "tf32": ("fp32", "tf32"),
    "bf16": ("fp32", "tf32", "bf16"),
    "fp16": ("fp32", "tf32", "fp16"),
    "fp8": ("fp32", "tf32", "bf16", "fp16", "fp8"),
    "int8": ("fp32", "tf32", "bf16", "fp16", "fp8", "int8"),
}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate (FLOP/s or B/s) and the mark of the ceiling that it comes from."""

    value: float
    mark: str


def element_bytes(precision: str) -> float:
    """Bytes of one stored element.

    Raises:
        BadInputError: The precision is unknown.
    """
    if precision not in _BYTES:
        raise BadInputError(f"unknown precision {precision!r}")
    return _BYTES[precision]


def between(precision: str) -> str:
    """The type of what passes between operators: eight bits are for weights and products."""
    return "bf16" if precision in ("fp8", "int8") else precision


def narrowed(size: float, stored: str, precision: str) -> float:
    """Bytes that data stored as `stored` takes in a plan of this precision, if that is less."""
    if stored not in _BYTES or stored in ("int8", "uint8"):
        return size
    return size * min(1.0, element_bytes(precision) / _BYTES[stored])


def _candidates(ceilings: Ceilings, precision: str) -> list[Ceiling]:
    if precision not in _MAY_USE:
        raise BadInputError(
            f"no products in precision {precision!r}", next_step=f"one of {', '.join(_MAY_USE)}"
        )
    return [c for c in ceilings.items if c.what == "matmul" and c.dtype in _MAY_USE[precision]]


def peak(ceilings: Ceilings, precision: str) -> Rate | None:
    """The rate that products of this precision cannot exceed.

    None where the precision's own rate was not measured: that of a wider type is no bound on it.

    Raises:
        BadInputError: There are no products in this precision.
    """
    candidates = _candidates(ceilings, precision)
    if not any(c.dtype == precision and c.best for c in candidates):
        return None
    best = max(candidates, key=lambda c: c.best or 0.0)
    return Rate(value=best.best or 0.0, mark=_mark(best))


def achieved(ceilings: Ceilings, precision: str) -> float | None:
    """The rate that a library reached in this precision, else the hardware's; None if unknown."""
    rates = [c.achieved or c.hardware or 0.0 for c in _candidates(ceilings, precision)]
    return max(rates, default=0.0) or None


def _mark(ceiling: Ceiling) -> str:
    """Where the better of the two figures comes from: a library's figure is always measured."""
    if ceiling.best is not None and ceiling.best == ceiling.achieved:
        return "measured"
    return ceiling.mark


def read_rate(ceilings: Ceilings, working_set_bytes: float) -> Rate | None:
    """The rate at which data of this size cannot be read faster, or None if unmeasured."""
    value = ceilings.read_bytes_per_s(working_set_bytes)
    if not value:
        return None
    marks = [_mark(c) for c in ceilings.items if c.what == "read" and c.best == value]
    return Rate(value=value, mark=marks[0] if marks else "measured")


def traffic_s(
    ceilings: Ceilings, *, read: float, written: float, working_set: float
) -> tuple[float, str | None]:
    """Least seconds to move these bytes, and the mark of the ceiling; (0, None) if unmeasured.

    Main memory reads and writes over the same wires, so the two add up; caches have ports for
    each, so there only the larger counts. A working set is in main memory when its read rate is
    within half as much again of that of the largest set measured.

    Args:
        ceilings: Of the device.
        read: Bytes read.
        written: Bytes written.
        working_set: Bytes that are touched, each once.
    """
    rate = read_rate(ceilings, working_set)
    if rate is None:
        return 0.0, None
    slowest = ceilings.read_bytes_per_s(float("inf")) or rate.value
    in_memory = rate.value <= 1.5 * slowest
    moved = read + written if in_memory else max(read, written)
    return moved / rate.value, rate.mark
