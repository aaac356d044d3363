"""Where a plan has to work, and which precisions and schemes make sense there."""

from dataclasses import dataclass, field
from typing import Literal

from suanli.base.plan import Precision

Objective = Literal["latency", "throughput"]

# Instruction sets that multiply the type faster than fp32 (names as in `CpuInfo.features`).
# avx512_fp16 is not among them: libraries run fp16 products at fp32's rate there, because the
# matrix units of those processors (AMX) take bf16 and int8 and no fp16.
_CPU_NEEDS: dict[str, tuple[str, ...]] = {
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "fp16": ("amx_fp16", "neon_fp16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "neon_dot"),
}
# Least compute capability with matrix units for the type: the CUDA C++ Programming Guide's table
# of tensor core input types per compute capability.
_CUDA_NEEDS: dict[str, tuple[int, int]] = {
    "fp16": (7, 0),
    "int8": (7, 5),
    "tf32": (8, 0),
    "bf16": (8, 0),
    "fp8": (8, 9),
}

# Float precisions from the finest rounding to the coarsest: 24, 11, 11 and 8 significant bits
# (fp16 has the smaller range, tf32 is a way to multiply and stores fp32).
FLOATS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")
COARSEST: Precision = "bf16"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What decides which plans are legal and in which order they are worth trying.

    Attributes:
        device: "cpu", "cuda:0", …
        cores: CPU cores that may be used.
        features: Instruction sets of the CPU, as in `CpuInfo.features`.
        capability: Compute capability of the GPU, such as "8.0"; None where it is not known, and
            then no precision is ruled out.
        batch: Samples in the step that decides.
        max_batch: Largest batch that the engine takes.
        lowest: The coarsest float precision that a plan may use, one of `FLOATS`.
        dynamic: Whether any batch up to the largest can be asked for; without it a batch cannot be
            split over streams.
        exported: Whether the model could be captured as a graph.
        images: Whether an input has four dimensions, so that channels_last means something.
        accepts_quantised: Whether labels or a tolerance can accept a quantised plan.
        calibration_samples: How many samples calibrate activations; 0 where there are none.
        present: Names of the backends that can be used here.
        why_absent: Backend name -> why not, where that is more than a missing package.
        build_scale: Build times relative to a model of ResNet-50's size; a first guess, the search
            learns the factor of each backend on this machine.
    """

    device: str
    cores: int
    objective: Objective
    batch: int
    present: frozenset[str]
    features: tuple[str, ...] = ()
    capability: str | None = None
    max_batch: int = 1
    lowest: Precision = COARSEST
    dynamic: bool = True
    exported: bool = True
    images: bool = False
    accepts_quantised: bool = False
    calibration_samples: int = 0
    why_absent: dict[str, str] = field(default_factory=dict)
    build_scale: float = 1.0

    @property
    def kind(self) -> str:
        """The device's kind: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def splits(self) -> bool:
        """Whether a batch can be divided among streams and calls."""
        return self.kind == "cpu" and self.dynamic and self.batch > 1


def why_not_precision(precision: Precision, situation: Situation) -> str:
    """Why a precision makes no sense on the device, in one line; "" if it does."""
    if precision == "fp32":
        return ""
    if precision in FLOATS and FLOATS.index(precision) > FLOATS.index(situation.lowest):
        return f"--precision {situation.lowest} leaves {precision} out"
    if situation.kind == "cuda":
        needed = _CUDA_NEEDS[precision]
        have = _capability(situation.capability)
        if have is None or have >= needed:
            return ""
        return (
            f"{precision} needs compute capability {needed[0]}.{needed[1]}, "
            f"{situation.device} has {situation.capability}"
        )
    instructions = _CPU_NEEDS.get(precision)
    if instructions is None:
        return f"{precision} exists on GPUs only"
    if any(name in situation.features for name in instructions):
        return ""
    return f"this CPU has no instructions that make {precision} faster than fp32"


def why_not_scheme(scheme: str, situation: Situation) -> str:
    """Why a quantisation scheme cannot be tried, in one line; "" if it can."""
    if not situation.accepts_quantised:
        return "quantised plans need labelled data or an explicit tolerance"
    if situation.lowest != COARSEST:
        return (
            f"--precision {situation.lowest} leaves quantised plans out: what they do not quantise "
            f"may run in {COARSEST}"
        )
    if scheme.endswith("-static") and not situation.calibration_samples:
        return f"{scheme} needs calibration data"
    if scheme.endswith("-weight"):
        return ""  # only memory is saved, the products run in a float precision
    return why_not_precision(scheme_precision(scheme), situation)


def scheme_precision(scheme: str) -> Precision:
    """The precision that a plan of this scheme carries: "int8-static" is "int8"."""
    return "fp8" if scheme.startswith("fp8") else "int8"


def _capability(text: str | None) -> tuple[int, int] | None:
    major, dot, minor = (text or "").partition(".")
    if not major.isdigit() or (dot and not minor.isdigit()):
        return None
    return int(major), int(minor or 0)
