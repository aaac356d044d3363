"""From a card's sheet to what kernels sustain on it."""

from dataclasses import dataclass

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.kernel_time import Machine
from suanli.cost.parameters import Clock, Parameters, Unit

_NARROW = {"tf32", "bf16", "fp16", "fp8", "int8"}
# Where the sheet says nothing of the last cache: that of a card of the same generation and a
# middling size, MiB. Rounded down; NVIDIA's architecture whitepapers.
_USUAL_L2_MB = {6: 3.0, 7: 5.0, 8: 6.0, 9: 50.0, 10: 120.0, 12: 48.0}
# Cards for people raise their clock above the printed one while power and heat allow; those for
# servers print their highest.
_RAISES_ITS_CLOCK = ("GeForce", "TITAN")
# Tensor units of these add up in fp32 at half of the rate that they multiply at. What feeding them
# costs beside (1 / fraction - 1 of the time at the full rate) is the same, so it weighs half.
_HALVED = ("GeForce",)
_FLOATS = {"tf32", "bf16", "fp16", "fp8"}
# Bytes per clock that the first cache of a multiprocessor gives, over those from Volta on: 31.3 of
# 108.3 as measured (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via
# microbenchmarking", 2018). Loads of 4 bytes go 8 threads at a time on Pascal and 32 from Volta on.
_FIRST_CACHE = {6: 0.29}
# What the attention kernels of PyTorch reach of the products' rate, over what they do on the cards
# that came before: they are written for Ampere's instructions. FlashAttention-2 reaches 35 % of an
# H100's printed rate (Shah et al., "FlashAttention-3", arXiv 2407.08608, 2024) and at most 73 % of
# an A100's (Dao, "FlashAttention-2", arXiv 2307.08691, 2023).
_OLDER_ATTENTION = {9: 0.35 / 0.73, 10: 0.35 / 0.73}
# Cores per multiprocessor and operations per clock give no count of multiprocessors, so a sheet
# without one gets this many; only quantisation depends on it.
_USUAL_MULTIPROCESSORS = 80


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card sustains in one element type, and what was not known of it.

    Attributes:
        machine: For kernels whose products run in the type asked for.
        unit: Which units its products run on.
        clock: Part of the printed clock that the power limit allows under products.
        lasting: Part of that which is left in steps that last, which warm the card.
        missing: Names of figures that the sheet lacks and the model would use.
    """

    machine: Machine
    unit: Unit
    clock: float
    lasting: float
    missing: tuple[str, ...]


def unit_of(gpu: GpuSheet, dtype: str) -> Unit:
    """Whether products of this type run on tensor units: from compute capability 7.0 on."""
    if dtype == "tf32" and gpu.flops("tf32") is None:
        return "vector"
    return "tensor" if dtype in _NARROW and _major(gpu) >= 7 else "vector"


def peak_flops(gpu: GpuSheet, dtype: str) -> float:
    """The sheet's dense rate, or the nearest that such products may run at.

    tf32 falls back to fp32 where there are no such units, as libraries do.

    Raises:
        BadInputError: The card has no units for the type, or no rate is known.
    """
    known = gpu.flops(dtype)
    if known is None and dtype == "tf32":
        known = gpu.flops("fp32")
    if known is None and dtype == "bf16" and _major(gpu) >= 8:
        known = gpu.flops("fp16")
    if known is None:
        has = ", ".join(gpu.dense_tflops) or "none"
        raise BadInputError(
            f"{gpu.name} has no {dtype} rate", next_step=f"rates known of it: {has}"
        )
    return known


def clock_share(gpu: GpuSheet, clock: Clock, *, flops: float, unit: Unit) -> float:
    """Part of the printed clock that the power limit sustains under dense products.

    1 where the sheet has no power limit; above 1 for cards that raise their clock.
    """
    if gpu.power_w is None:
        return 1.0
    most = clock.raised if _for_people(gpu) else 1.0
    left = 1.0 / needed_share(gpu, clock, flops=flops, unit=unit)
    turn = clock.lowest_voltage ** (1.0 / clock.exponent)
    share = left**clock.exponent if left > turn else clock.lowest_voltage * left / turn
    return float(min(most, max(share, _guaranteed_share(gpu))))


def _guaranteed_share(gpu: GpuSheet) -> float:
    """The clock that the maker guarantees under load, over the highest; 0 where one is unknown."""
    if gpu.base_clock_mhz is None or gpu.boost_clock_mhz is None:
        return 0.0
    return gpu.base_clock_mhz / gpu.boost_clock_mhz


def needed_share(gpu: GpuSheet, clock: Clock, *, flops: float, unit: Unit) -> float:
    """What dense products at the printed clock need, over what the power limit leaves them.

    1 where the sheet has no power limit.
    """
    if gpu.power_w is None:
        return 1.0
    need_w = watts_per_tflop(gpu, clock, unit) * flops / 1e12
    left_w = max(gpu.power_w * (1.0 - clock.memory_share) - clock.board_w, 0.2 * gpu.power_w)
    return float(need_w / left_w)


def watts_per_tflop(gpu: GpuSheet, clock: Clock, unit: Unit) -> float:
    """Watts for 1e12 operations per second at the printed clock, by generation."""
    vector = _by_capability(clock.w_per_vector_tflop, gpu.compute_capability)
    if unit == "vector":
        return vector
    return vector / _by_capability(clock.tensor_gain, gpu.compute_capability)


def rates(gpu: GpuSheet, parameters: Parameters, dtype: str) -> Rates:
    """What the card sustains for products of this type and for sweeps.

    Raises:
        BadInputError: The card has no such units, or its sheet lacks rate or bandwidth.
    """
    peak = peak_flops(gpu, dtype)
    if dtype == "fp16" and unit_of(gpu, dtype) == "vector":
        # Two halves at a time, as the sheet has it, would add up in halves; libraries that PyTorch
        # calls add up in fp32, at its rate.
        peak = min(peak, gpu.flops("fp32") or peak)
    if gpu.memory_gb_per_s is None:
        raise BadInputError(
            f"{gpu.name} has no memory bandwidth in its sheet",
            next_step="add memory_gb_per_s to its file",
        )
    unit = unit_of(gpu, dtype)
    generation = parameters.generation(gpu.compute_capability)
    fraction = parameters.product_fraction[unit]
    if unit == "tensor" and dtype in _FLOATS and gpu.name.startswith(_HALVED):
        fraction = 2.0 * fraction / (1.0 + fraction)
    fraction *= generation.tensor if unit == "tensor" else generation.product
    newest = gpu.sources[:1] if gpu.mark == "measured" else ()
    measured = any(f"dense_tflops.{dtype}" in source.figures for source in newest)
    # A rate that was measured has the clock in it.
    clock = 1.0 if measured else clock_share(gpu, parameters.clock, flops=peak, unit=unit)
    l2_mb = gpu.l2_mb or _USUAL_L2_MB.get(_major(gpu), 5.0)
    machine = Machine(
        flops=peak * fraction * clock,
        bytes_per_s=gpu.memory_gb_per_s
        * 1e9
        * parameters.bandwidth_fraction
        * (parameters.uncorrected_gain if _for_people(gpu) else 1.0)
        * generation.bandwidth,
        l2_bytes=l2_mb * 2**20,
        multiprocessors=gpu.multiprocessors or _USUAL_MULTIPROCESSORS,
        kernel_s=parameters.kernel_s,
    )
    figures = {
        "last cache": gpu.l2_mb,
        "multiprocessors": gpu.multiprocessors,
        "power limit": gpu.power_w,
        f"{dtype} rate": gpu.flops(dtype),
    }
    missing = tuple(name for name, value in figures.items() if value is None)
    need = needed_share(gpu, parameters.clock, flops=peak, unit=unit)
    return Rates(
        machine=machine,
        unit=unit,
        clock=clock,
        lasting=1.0 - parameters.warm_loss[unit] * min(1.0, need),
        missing=missing,
    )


def _for_people(gpu: GpuSheet) -> bool:
    return gpu.name.startswith(_RAISES_ITS_CLOCK)


def attention_share(gpu: GpuSheet) -> float:
    """What attention kernels reach there, over what they do on cards up to Ampere and Ada."""
    return _OLDER_ATTENTION.get(_major(gpu), 1.0)


def first_cache_share(gpu: GpuSheet) -> float:
    """Rate of kernels that are as fast as they load from the first cache, over later cards'."""
    return _FIRST_CACHE.get(_major(gpu), 1.0)


def _major(gpu: GpuSheet) -> int:
    return int(gpu.compute_capability.partition(".")[0])


def _by_capability(table: dict[str, float], capability: str) -> float:
    """The entry of this capability, else of the nearest one."""
    wanted = float(capability)
    return table[min(table, key=lambda key: abs(float(key) - wanted))]
