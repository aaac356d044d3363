"""What a workload has to compute, operator by operator."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "optimizer"]
BoundBy = Literal["compute", "memory", "overhead", "communication", "data"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator call as captured.

    Attributes:
        name: ATen name without overload, such as "convolution" or "scaled_dot_product_attention".
        module: Path of the module that made it, such as "layer1.0.conv1"; "" where unknown.
        source: "file.py:line" of the user's code; "" where unknown.
        dtype: Element type of the main input, such as "fp32".
        flops: Operations; a multiply-add counts as two.
        bytes_read: Bytes of the inputs, parameters included, each counted once.
        bytes_written: Bytes of the outputs.
        parameter_bytes: The part of `bytes_read` that is parameters.
        input_shapes: Shapes of the tensor inputs.
        output_shapes: Shapes of the tensor outputs.
        counted: False where no formula exists and `flops` is only the output's element count.
        needed_flops: The part of `flops` that every implementation of this operator has to do:
            products with zero padding and pairs under a causal mask left out. None is all.
    """

    name: str
    phase: Phase = "forward"
    module: str = ""
    source: str = ""
    dtype: str = "fp32"
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    parameter_bytes: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    matmul: bool = False
    counted: bool = True
    needed_flops: int | None = None

    @property
    def least_flops(self) -> int:
        """`needed_flops`, or `flops` where nothing can be left out."""
        return self.flops if self.needed_flops is None else self.needed_flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs and bytes of one step of a workload.

    Attributes:
        batch: Samples in the step.
        parameter_bytes: Bytes of the parameters and buffers, once, at their stored dtype.
        input_bytes: Bytes that must come in with every step.
        output_bytes: Bytes that must go out with every step.
        read_parameters: Elements of parameters and buffers that the forward pass has to read, each
            once, of a table only the rows taken; None where unknown (then all of them).
        read_parameter_bytes: The same at their stored dtype.
        kept_elements: Elements of keys and values of earlier tokens that the step has to read.
    """

    operators: tuple[Operator, ...]
    batch: int
    parameters: int
    parameter_bytes: int
    input_bytes: int
    output_bytes: int
    read_parameters: int | None = None
    read_parameter_bytes: int | None = None
    kept_elements: int = 0

    @property
    def flops(self) -> int:
        """Operations of the whole step."""
        return sum(op.flops for op in self.operators)

    @property
    def matmul_flops(self) -> int:
        """Operations that matrix units can do (convolutions, products, attention)."""
        return sum(op.flops for op in self.operators if op.matmul)

    @property
    def least_matmul_flops(self) -> int:
        """`matmul_flops` without what an implementation may leave out: the figure for a bound."""
        return sum(op.least_flops for op in self.operators if op.matmul)


@dataclass(frozen=True, kw_only=True)
class SpeedOfLight:
    """The least time the ceilings allow for the work.

    Attributes:
        ms: Lower bound of one step in milliseconds.
        fraction: `ms` over the measured step; None before there is a measurement.
        bound_by: Which term is the largest.
        compute_ms: Time of the operations at the hardware's rate.
        memory_ms: Time of the bytes that no fusion avoids.
        marks: The marks of the ceilings used, so that a derived bound says so.
    """

    ms: float
    bound_by: BoundBy
    compute_ms: float
    memory_ms: float
    overhead_ms: float = 0.0
    fraction: float | None = None
    marks: tuple[str, ...] = ()
