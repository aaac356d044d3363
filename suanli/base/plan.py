"""A plan: every decision on how to compute a workload, as a file a person can read and diff."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
Option = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights and activations become small integers or floats.

    Attributes:
        scheme: "int8-static" (calibrated activations), "int8-dynamic", "int8-weight" or
            "fp8-dynamic".
        keep: Operators left in the plan's float precision because they broke the answer.
        calibration_samples: How many calibration samples were used; 0 for the schemes without.
    """

    scheme: str
    keep: tuple[str, ...] = ()
    calibration_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to compute a workload.

    Attributes:
        backend: A row of the backend table, such as "eager", "inductor", "openvino".
        precision: What the matrix products run in; inputs and outputs stay as the user has them.
        device: "cpu", "cuda:0", …
        memory_layout: "contiguous" or "channels_last".
        threads: CPU threads of one stream; 0 is all usable cores over the streams.
        streams: Independent streams that share a batch.
        sub_batch: Samples that one backend call gets; 0 is the whole share of a stream.
        options: What only this backend understands; its file names them.
        quantization: None for a floating-point plan.
        float_operators: Operators kept in fp32 in a lower-precision plan, by name.
    """

    backend: str
    precision: Precision = "fp32"
    device: str = "cpu"
    memory_layout: Literal["contiguous", "channels_last"] = "contiguous"
    threads: int = 0
    streams: int = 1
    sub_batch: int = 0
    quantization: Quantization | None = None
    float_operators: tuple[str, ...] = ()
    options: dict[str, Option] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name the plan: equal plans have equal keys."""
        from suanli.base.codec import to_json

        canonical = json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """One short line for a table, such as "openvino int8 2x1"."""
        scheme = self.quantization.scheme if self.quantization else self.precision
        parts = [self.backend, scheme.removesuffix("-static")]
        if self.memory_layout == "channels_last":
            parts.append("nhwc")
        if self.streams > 1:
            parts.append(f"{self.streams}x{self.threads or 'auto'}")
        elif self.threads:
            parts.append(f"{self.threads}t")
        if self.sub_batch:
            parts.append(f"split{self.sub_batch}")
        if self.quantization and self.quantization.keep:
            parts.append(f"keep{len(self.quantization.keep)}")
        words = {True: "", False: "no-"}
        parts += [
            f"{words[value]}{name}" if isinstance(value, bool) else f"{name}={value}"
            for name, value in sorted(self.options.items())
            if value != ""
        ]
        return " ".join(parts)

    @property
    def quantized(self) -> bool:
        """Whether the answer may change by more than rounding, so that labels must decide."""
        return self.quantization is not None

    def with_(self, **changes: Any) -> "Plan":
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """What the search may know of a backend: the row's name, its needs and its choices.

    Attributes:
        packages: Import names that must be there.
        install: The exact command that brings them.
        devices: Device kinds, "cpu" or "cuda".
        precisions: Float precisions it can be asked for, per device kind.
        quantizations: Schemes of `Quantization` it offers, per device kind.
        layouts: Memory layouts worth trying.
        options: Name -> values worth trying; the product of all is its option space. The first
            value is what the backend does where a plan does not name the option, and plans of the
            search leave it out.
        option_needs: Option name -> what it makes sense for: device kinds, precisions or schemes
            (one of each sort that is named must hold). Without an entry it always does.
        batch_option: Name of the option that is given the batch asked for, in a backend that can
            compile for one size; "" where there is none.
        build_s: Seconds that a build takes on two cores for a model of ResNet-50's size; the
            search uses it to order candidates and to see what no longer fits the budget.
        promise: Rough step time relative to eager fp32 = 1, for ordering only: scheme or precision
            -> figure; "cuda/bf16" stands before "bf16" on such a device.
        streams: Whether several streams can share the machine, and a call can be split.
        needs_onnx: Whether the build starts from an ONNX file.
        needs_export: Whether the build starts from the exported program; where it does not, the
            backend's baselines run a model that cannot be exported.
        ships: Whether a built plan can be saved, or only built anew at load.
        baselines: Plans of this backend that a person has without Suanli, in the order in which
            to try them; the device's number is filled in.
    """

    name: str
    install: str
    packages: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    precisions: dict[str, tuple[Precision, ...]] = field(default_factory=dict)
    quantizations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layouts: tuple[Literal["contiguous", "channels_last"], ...] = ("contiguous",)
    options: dict[str, tuple[Option, ...]] = field(default_factory=dict)
    option_needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    batch_option: str = ""
    build_s: float = 1.0
    promise: dict[str, float] = field(default_factory=dict)
    streams: bool = False
    needs_onnx: bool = False
    needs_export: bool = True
    ships: bool = True
    baselines: tuple[Plan, ...] = ()
