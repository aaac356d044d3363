"""Theoretical occupancy: how many blocks of a kernel fit on one multiprocessor, and what limits it.

Limits per architecture are those of the CUDA C++ Programming Guide's table of compute
capabilities; allocation granularities those of NVIDIA's occupancy calculator.
"""

from collections.abc import Callable
from dataclasses import dataclass

from suanli.base.errors import BadInputError

_REGISTERS = 65536  # per multiprocessor, all architectures below
_REGISTER_UNIT = 256  # registers are given to a warp in such pieces
_MOST_REGISTERS = 255
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one multiprocessor of an architecture has.

    Attributes:
        warps: Resident at most.
        blocks: Resident at most.
        shared_bytes: Shared memory for all blocks.
        block_shared_bytes: For one block, opted in.
        shared_unit: Bytes in whose multiples it is given out.
        reserved_bytes: Taken by the system from each block's share.
        partitions: Into which the registers are divided.
    """

    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int
    shared_unit: int
    reserved_bytes: int
    partitions: int = 4


def _limits(
    warps: int, blocks: int, shared_kb: int, block_kb: int, unit: int, reserved: int
) -> Limits:
    return Limits(
        warps=warps,
        blocks=blocks,
        shared_bytes=shared_kb * 1024,
        block_shared_bytes=block_kb * 1024,
        shared_unit=unit,
        reserved_bytes=reserved,
        partitions=4,
    )


_PASCAL = Limits(
    warps=64,
    blocks=32,
    shared_bytes=64 * 1024,
    block_shared_bytes=48 * 1024,
    shared_unit=256,
    reserved_bytes=0,
    partitions=2,
)
_HOPPER = _limits(64, 32, 228, 227, 128, 1024)
_BLACKWELL = _limits(48, 24, 100, 99, 128, 1024)
LIMITS = {
    "sm_60": _PASCAL,
    "sm_61": _limits(64, 32, 96, 48, 256, 0),
    "sm_70": _limits(64, 32, 96, 96, 256, 0),
    "sm_75": _limits(32, 16, 64, 64, 256, 0),
    "sm_80": _limits(64, 32, 164, 163, 128, 1024),
    "sm_86": _limits(48, 16, 100, 99, 128, 1024),
    "sm_87": _limits(48, 16, 164, 163, 128, 1024),
    "sm_89": _limits(48, 24, 100, 99, 128, 1024),
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_103": _HOPPER,
    "sm_120": _BLACKWELL,
    "sm_121": _BLACKWELL,
}


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """How much of one multiprocessor a kernel can fill.

    Attributes:
        blocks: Resident blocks; 0 where not even one fits.
        warps: Resident warps.
        fraction: Resident warps over the most there can be.
        limited_by: "registers", "shared memory", "warps" or "blocks".
    """

    blocks: int
    warps: int
    fraction: float
    limited_by: str


def occupancy(
    arch: str,
    *,
    threads: int,
    registers: int,
    static_shared_bytes: int = 0,
    dynamic_shared_bytes: int = 0,
) -> Occupancy:
    """Resident blocks per multiprocessor.

    Args:
        arch: Such as "sm_90".
        threads: Per block, 1 to 1,024.
        registers: Per thread.
        static_shared_bytes: Per block.
        dynamic_shared_bytes: Per block.

    Raises:
        BadInputError: The architecture is unknown, or the block is larger than any card takes.
    """
    if arch not in LIMITS:
        raise BadInputError(
            f"unknown architecture {arch!r}", next_step=f"one of {', '.join(LIMITS)}"
        )
    if not 1 <= threads <= MOST_THREADS:
        raise BadInputError(f"a block of {threads} threads; a card takes 1 to {MOST_THREADS}")
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    fitting = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": _by_registers(limits, warps, registers),
        "shared memory": _by_shared(limits, static_shared_bytes + dynamic_shared_bytes),
    }
    name = min(fitting, key=lambda key: fitting[key])
    blocks = fitting[name]
    return Occupancy(
        blocks=blocks,
        warps=blocks * warps,
        fraction=blocks * warps / limits.warps,
        limited_by=name,
    )


def _by_registers(limits: Limits, warps: int, registers: int) -> int:
    if registers > _MOST_REGISTERS:
        return 0
    if registers == 0:
        return limits.blocks
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    # a launch is refused as if it took registers of four partitions at once, whatever there are
    if per_warp * (-(-warps // 4) * 4) > _REGISTERS:
        return 0
    each = _REGISTERS // limits.partitions // per_warp
    return each * limits.partitions // warps


def _by_shared(limits: Limits, wanted: int) -> int:
    if wanted > limits.block_shared_bytes:
        return 0
    taken = wanted + limits.reserved_bytes
    taken = -(-taken // limits.shared_unit) * limits.shared_unit
    return limits.blocks if taken == 0 else limits.shared_bytes // taken


def lift(
    arch: str,
    *,
    threads: int,
    registers: int,
    static_shared_bytes: int = 0,
    dynamic_shared_bytes: int = 0,
) -> str:
    """What would let one more block onto a multiprocessor, in words; "" where it is full.

    Args:
        arch: Such as "sm_90".
        threads: Per block.
        registers: Per thread.
        static_shared_bytes: Per block.
        dynamic_shared_bytes: Per block.

    Raises:
        BadInputError: As for `occupancy`.
    """
    given = {"threads": threads, "registers": registers}
    shared = static_shared_bytes + dynamic_shared_bytes
    now = occupancy(arch, **given, static_shared_bytes=shared)
    if now.fraction >= 1:
        return ""
    steps = []
    if _by_registers(LIMITS[arch], -(-threads // 32), registers) == now.blocks:
        fewer = _most(
            lambda n: _by_registers(LIMITS[arch], -(-threads // 32), n) > now.blocks, registers
        )
        steps.append(f"at most {fewer} registers a thread, not {registers}" if fewer else "")
    if _by_shared(LIMITS[arch], shared) == now.blocks:
        less = _most(lambda n: _by_shared(LIMITS[arch], n) > now.blocks, shared)
        steps.append(f"at most {less} bytes of shared memory a block, not {shared}")
    if now.blocks >= LIMITS[arch].blocks:
        steps.append(f"larger blocks than {threads} threads")
    elif LIMITS[arch].warps // -(-threads // 32) == now.blocks:
        steps.append(f"blocks that divide {LIMITS[arch].warps} warps, not {-(-threads // 32)}")
    return " and ".join(step for step in steps if step)


def _most(fits: Callable[[int], bool], above: int) -> int:
    """The largest number below `above` that fits; 0 where none does."""
    return next((n for n in range(above - 1, 0, -1) if fits(n)), 0)
