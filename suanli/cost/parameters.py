"""The predictor's numbers: few, each with a meaning, fitted by `benchmarks/fit_predictor.py`."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from suanli.base.codec import read
from suanli.cost.kernel_time import Rows, Shape

Unit = Literal["vector", "tensor"]
_FILE = Path(__file__).with_name("predictor.json")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far the power limit holds the clock below the one that the printed rates assume.

    What is left of the limit after board and memory, per 1e12 operations per second of the printed
    rate, is compared with what the chip needs; below that the clock falls with a power of the
    ratio (power grows with clock times voltage squared, and voltage with clock), and in proportion
    to it where the voltage is as low as the chip can take. Never below the sheet's base clock.

    Attributes:
        board_w: Watts that the board takes whatever it does.
        memory_share: Part of the limit that the memory takes under load.
        exponent: 1/3 if voltage followed the clock in proportion, 1 if it did not fall at all.
        lowest_voltage: Part of the printed clock from which on down the voltage stays as it is.
        raised: Clock over the printed one of cards for people, where the limit leaves room.
        idle_share: Part of the power limit that an idle card in its working state takes.
        busy_share: Part of the limit that it takes beside while a kernel runs, whichever.
        busy_w_per_gb_per_s: Watts for 1e9 bytes per second that are moved.
        limit_floor: Part of the power limit under which lowering it takes no power from the clock.
        limit_exponent: How a step's time grows with the power it lacks above that floor.
        limit_reached: Part of a limit that a card draws which it holds back.
        w_per_vector_tflop: Watts for 1e12 fp32 operations per second at the printed clock, by
            compute capability; falls with the fabrication process.
        tensor_gain: How many times less a tensor unit takes for one fp16 operation.
    """

    board_w: float
    memory_share: float
    exponent: float
    lowest_voltage: float
    raised: float
    idle_share: float
    busy_share: float
    busy_w_per_gb_per_s: float
    limit_floor: float
    limit_exponent: float
    limit_reached: float
    w_per_vector_tflop: dict[str, float]
    tensor_gain: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Standard deviations of log(measured / predicted), from devices left out of the fit.

    Attributes:
        base: Of whole steps on a device of a fitted generation.
        transfer: Of steps predicted from a measurement of the same step on another card.
        collective: Of single collectives.
        power: Of time and power under a power limit.
        doubling: Added, before squaring, for each doubling of the number of devices.
        operator: Of single operators there.
        unseen_generation: Added in square for a compute capability that no data covers.
        generation_step: Added for each major version that it is away from the nearest fitted one.
        unknown_figure: Added in square for each figure that the sheet lacks.
        host: Of the host's time beside that of the usual host of such cards; added in square in
            the part of the step in which the card waits for it.
    """

    base: float
    transfer: float
    collective: float
    power: float
    doubling: float
    operator: float
    unseen_generation: float
    generation_step: float
    unknown_figure: float
    host: float


@dataclass(frozen=True, kw_only=True)
class LinkParameters:
    """What collectives reach of a link.

    Attributes:
        share: Of the stated rate of one direction, in large groups, by kind of link.
        small_group: What switches lose of that share in a group of n, times n.
        piece_s: Seconds from one piece of a message to the next; sets how slowly large messages
            approach the full rate.
        start_s: Least seconds of a collective.
        step_s: What each further device adds to that.
        network_s: What a network adds to that.
        start_overlap: Exponent of the norm that joins the least time and the time of the bytes.
        level_share: Part of the shorter of two levels (in a server, between servers) that is not
            hidden behind the longer.
    """

    share: dict[str, float]
    small_group: float
    piece_s: float
    start_s: float
    step_s: float
    network_s: float
    start_overlap: float
    level_share: float


@dataclass(frozen=True, kw_only=True)
class CountParameters:
    """What totals of a model say of its time.

    Attributes:
        share: Part of the sustained rate that models of many operations per activation reach.
        half_intensity: Multiply-adds per activation at which half of that is left.
        traffic: How often each activation is read or written.
        layers: Layers of the usual model.
        starts: Kernels per layer.
        overlap: Exponent of the norm that joins arithmetic and traffic.
    """

    share: float
    half_intensity: float
    traffic: float
    layers: float
    starts: float
    overlap: float


@dataclass(frozen=True, kw_only=True)
class CpuParameters:
    """What operators reach on a CPU of its measured ceilings.

    Attributes:
        share: Part of the best library rate, by kind of operator.
        grouped_share: The same for convolutions of one channel per group.
        gradient_share: Part of either that the backward pass of convolutions reaches.
        traffic: Bytes moved over those counted, by kind, where data are passed over again.
        fused_traffic: Part of the bytes left where a compiler fuses.
        layout_traffic: What convolutions take beside, over the time to move their data once: the
            library brings images to a layout of its own and back.
        weights_traffic: The time to bring weights into the library's order, over that of reading
            them from where they lie.
        element_s: Seconds of one thread for an element, in kernels that take one after the other.
        fresh_s_per_byte: Seconds to take a byte of memory anew from the system, whose pages are
            cleared at first use.
        call_s: Seconds of one operator call.
        backward_call_s: The same in the backward pass.
        spread: Standard deviation of log(measured / predicted).
    """

    share: dict[str, float]
    grouped_share: float
    gradient_share: float
    traffic: dict[str, float]
    fused_traffic: float
    layout_traffic: float
    weights_traffic: float
    element_s: float
    fresh_s_per_byte: float
    call_s: float
    backward_call_s: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What data say of one compute capability beside the common figures: factors near 1."""

    product: float = 1.0
    tensor: float = 1.0
    bandwidth: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All numbers of the model of one device.

    Attributes:
        products: Efficiency by shape, for vector units and for tensor units.
        product_fraction: Part of the printed rate that large products sustain where power allows.
        warm_loss: Part of that which steps that last lose where products need all the power that
            the limit leaves them; in proportion where they need less.
        bandwidth_fraction: Part of the printed bandwidth that large sweeps sustain.
        uncorrected_gain: How much more of it cards for people reach, whose memory carries no codes
            for the correction of errors.
        rows: Passes over rows.
        kernel_s: Least seconds of a kernel on the device.
        host_forward_s: Seconds of the host for one operator called eagerly, the model's own
            Python included, beside a card of compute capability 8.0.
        host_backward_s: The same for one operator of the backward pass, its share of clearing and
            adding up gradients included.
        host_update_s: The same for one tensor that the optimiser updates.
        host_generation: How many times slower the hosts of cards one major compute capability
            older are: servers and frameworks age with their cards.
        convolution_fraction: Of a product of the same size, for convolutions.
        gradient_fraction: Part of that which their backward pass reaches.
        grouped_fraction: The same for convolutions of few channels per group.
        grouped_gradient_fraction: The same for their backward pass.
        depthwise_fraction: The same for one channel per group, on elements of two bytes; half of
            that on four, as these kernels are as fast as they load.
        depthwise_gradient_fraction: The same for their backward pass.
        winograd_gain: How many times faster vector units do dense convolutions of 3 x 3 at stride
            1, with fewer multiplications (Lavin and Gray, "Fast algorithms for convolutional
            neural networks", 2016: 2.25 at least, less what the transforms cost).
        attention_fraction: The same for attention kernels.
        recurrent_step_s: Seconds that one step of a recurrent layer takes at least.
        layout_fraction: Part of the rate of channels last that narrow convolutions on images
            which lie channels first reach.
        layout_traffic: Bytes of narrow convolutions on images that lie channels first, over those
            of channels last, which the tensor units need.
        layout_gradient_traffic: The same for their backward pass.
        fused_traffic: Part of the bytes between operators that is left after compilation.
        fused_launches: Part of the kernels left.
        update_traffic: Bytes of an optimiser update run as a list of sweeps, over one sweep.
        clock: The power limit's effect.
        links: Collectives.
        overlap: Part of the replicas' communication that computation can hide.
        counts: For models of which only totals are known.
        cpu: The same for the CPU at hand.
        spread: Errors that remain.
        capability: Factors by compute capability.
        fitted_capabilities: Those that data cover.
    """

    products: dict[Unit, Shape]
    product_fraction: dict[Unit, float]
    warm_loss: dict[Unit, float]
    bandwidth_fraction: float
    uncorrected_gain: float
    rows: Rows
    kernel_s: float
    host_forward_s: float
    host_backward_s: float
    host_update_s: float
    host_generation: float
    convolution_fraction: dict[Unit, float]
    gradient_fraction: float
    grouped_fraction: float
    grouped_gradient_fraction: float
    depthwise_fraction: float
    depthwise_gradient_fraction: float
    winograd_gain: float
    attention_fraction: dict[Unit, float]
    recurrent_step_s: float
    layout_fraction: float
    layout_traffic: float
    layout_gradient_traffic: float
    fused_traffic: float
    fused_launches: float
    update_traffic: float
    clock: Clock
    links: LinkParameters
    overlap: float
    counts: CountParameters
    cpu: CpuParameters
    spread: Spread
    fitted_capabilities: tuple[str, ...]
    capability: dict[str, Generation] = field(default_factory=dict)

    def generation(self, capability: str) -> Generation:
        """Factors of a compute capability; those of none where no data cover it."""
        return self.capability.get(capability, Generation())


@cache
def parameters() -> Parameters:
    """The fitted parameters that ship with the package."""
    return read(Parameters, _FILE)
