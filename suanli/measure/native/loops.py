"""Which register-only loop shows the limit of which dtype on which processor."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One arithmetic loop of loops.c.

    Attributes:
        name: The function's name without "suanli_".
        dtype: The ceiling that it shows.
        needs: Processor features without which it must not run.
        operations_per_clock: The most that one core can do per clock (a multiply-add as two), from
            the makers' optimisation manuals, two units assumed where models have one or two. For
            ceilings derived without a compiler.
        what: The instruction, for people.
    """

    name: str
    dtype: str
    needs: tuple[str, ...]
    operations_per_clock: int
    what: str


# The fastest first within a dtype; the generic loops need nothing and come last.
ARITHMETIC = (
    Loop(
        name="fp32_vector",
        dtype="fp32",
        needs=("avx512f",),
        operations_per_clock=64,
        what="AVX-512 multiply-add",
    ),
    Loop(
        name="fp32_vector",
        dtype="fp32",
        needs=("avx2", "fma"),
        operations_per_clock=32,
        what="AVX2 multiply-add",
    ),
    Loop(
        name="fp32_vector",
        dtype="fp32",
        needs=("neon",),
        operations_per_clock=32,
        what="NEON multiply-add",
    ),
    Loop(
        name="fp32_vector",
        dtype="fp32",
        needs=(),
        operations_per_clock=16,
        what="vector multiply and add",
    ),
    Loop(
        name="bf16_tiles",
        dtype="bf16",
        needs=("amx_tile", "amx_bf16"),
        operations_per_clock=1024,
        what="AMX bf16 tile product",
    ),
    Loop(
        name="bf16_vector",
        dtype="bf16",
        needs=("avx512f", "avx512_bf16"),
        operations_per_clock=128,
        what="AVX-512 bf16 dot product",
    ),
    Loop(
        name="bf16_vector",
        dtype="bf16",
        needs=("neon", "bf16"),
        operations_per_clock=128,
        what="NEON bf16 matrix product",
    ),
    Loop(
        name="fp16_tiles",
        dtype="fp16",
        needs=("amx_tile", "amx_fp16"),
        operations_per_clock=1024,
        what="AMX fp16 tile product",
    ),
    Loop(
        name="fp16_vector",
        dtype="fp16",
        needs=("avx512f", "avx512_fp16"),
        operations_per_clock=128,
        what="AVX-512 fp16 multiply-add",
    ),
    Loop(
        name="fp16_vector",
        dtype="fp16",
        needs=("neon", "neon_fp16"),
        operations_per_clock=64,
        what="NEON fp16 multiply-add",
    ),
    Loop(
        name="int8_tiles",
        dtype="int8",
        needs=("amx_tile", "amx_int8"),
        operations_per_clock=2048,
        what="AMX int8 tile product",
    ),
    Loop(
        name="int8_vnni",
        dtype="int8",
        needs=("avx512f", "avx512_vnni"),
        operations_per_clock=256,
        what="AVX-512 VNNI dot product",
    ),
    Loop(
        name="int8_avx_vnni",
        dtype="int8",
        needs=("avx2", "avx_vnni"),
        operations_per_clock=192,
        what="AVX VNNI dot product",
    ),
    Loop(
        name="int8_mmla",
        dtype="int8",
        needs=("neon", "i8mm"),
        operations_per_clock=256,
        what="NEON int8 matrix product",
    ),
    Loop(
        name="int8_dot",
        dtype="int8",
        needs=("neon", "neon_dot"),
        operations_per_clock=128,
        what="NEON int8 dot product",
    ),
    Loop(
        name="int8_avx2",
        dtype="int8",
        needs=("avx2",),
        operations_per_clock=96,
        what="AVX2 byte multiply and add",
    ),
)


def possible_loops(features: tuple[str, ...], *, amx_allowed: bool | None) -> list[Loop]:
    """The loops that a processor with these features may run, at most one per dtype.

    Args:
        features: As in `CpuInfo.features`.
        amx_allowed: Whether the kernel granted tile registers; without it no tile loop may run.

    Returns:
        The widest of each dtype. A dtype that the processor has no instruction for is absent.
    """
    chosen: dict[str, Loop] = {}
    for loop in ARITHMETIC:
        tiles = "amx_tile" in loop.needs
        if set(loop.needs) <= set(features) and (not tiles or amx_allowed):
            chosen.setdefault(loop.dtype, loop)
    return list(chosen.values())
