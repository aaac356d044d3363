"""What `suanli kernel` returns, and prints with `--json`."""

from dataclasses import dataclass, field
from typing import Literal

from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.results import SchemaName
from suanli.base.timing import Estimate


@dataclass(frozen=True, kw_only=True)
class KernelFinding:
    """Something that is wrong with a kernel, or slow.

    Attributes:
        kind: Such as "race", "out-of-bounds", "uncoalesced", "bank-conflict".
        severity: "error" makes the answer wrong or undefined, "warning" costs time.
        where: "file:line"; "" where the line is unknown.
        text: One line.
        factor: For a warning, how many times more than needed is moved; else None.
    """

    kind: str
    severity: Literal["error", "warning"]
    where: str
    text: str
    factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """A kernel checked at one shape with one configuration.

    Attributes:
        status: "verified", "rejected" (ran, but wrong), "failed" (crash, time-out) or "refused"
            (cannot be judged here; the reason says why).
        where: "host execution on CPU", "interpreter on CPU", or the device.
        error_share: Largest error over its bound; 1 is at the bound. None where nothing ran.
        max_abs_error: Largest error in the outputs' unit.
        reason: One line; "" if verified.
        printed: What the kernel printed, as far as it is kept.
        seconds_spent: Wall time.
    """

    sizes: dict[str, int]
    dtype: str
    config: dict[str, int]
    where: str
    status: str
    reason: str = ""
    printed: str = ""
    error_share: float | None = None
    max_abs_error: float | None = None
    findings: tuple[KernelFinding, ...] = ()
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KernelCheckResult:
    """What `suanli kernel check` found.

    Attributes:
        language: "CUDA C++" or "Triton".
        ok: Whether every case that could be judged is verified, and there was one.
        notes: What a person should know of how it was checked.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    kernel: str
    language: str
    ok: bool
    cases: tuple[KernelCase, ...]
    notes: tuple[str, ...] = ()
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InstructionMix:
    """Instructions in the machine code, counted once each wherever they stand.

    Attributes:
        total: All of them.
        tensor_core: Matrix instructions.
        global_loads: From global memory, of which `wide_loads` move 16 bytes a thread.
        global_stores: To global memory, of which `wide_stores` move 16 bytes a thread.
        shared: Loads and stores of shared memory.
        local: Loads and stores of local memory: spills and arrays.
        atomics: Atomic operations and reductions in memory.
        barriers: Barriers of the block.
        shuffles: Exchanges between lanes.
        special: Exponentials, logarithms, reciprocals, square roots, sines.
    """

    total: int
    tensor_core: int = 0
    global_loads: int = 0
    wide_loads: int = 0
    global_stores: int = 0
    wide_stores: int = 0
    shared: int = 0
    local: int = 0
    atomics: int = 0
    barriers: int = 0
    shuffles: int = 0
    special: int = 0


@dataclass(frozen=True, kw_only=True)
class KernelOccupancy:
    """Theoretical occupancy on one multiprocessor.

    Attributes:
        fraction: Resident warps over the most that there can be.
        limited_by: "registers", "shared memory", "warps" or "blocks".
        lift: What would let one more block in; "" where nothing is to be won.
    """

    blocks: int
    warps: int
    fraction: float
    limited_by: str
    lift: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelRoofline:
    """Where the declared work stands under one card's ceilings (datasheet figures).

    Attributes:
        gpu: The card.
        dtype: Whose rate is used; "tf32" for fp32 products on tensor cores.
        arithmetic_intensity: Operations per byte.
        flops_per_s: The card's rate.
        bytes_per_s: The card's memory bandwidth.
        ridge: Operations per byte at which these two ceilings meet.
        bound_by: "compute" or "memory".
        sol_ms: Least time that the ceilings allow.
    """

    gpu: str
    dtype: str
    flops: int
    bytes: int
    arithmetic_intensity: float
    flops_per_s: float
    bytes_per_s: float
    ridge: float
    bound_by: str
    sol_ms: float


@dataclass(frozen=True, kw_only=True)
class KernelArch:
    """One function of a kernel, compiled for one architecture.

    Attributes:
        status: "compiled", "failed" (the reason says why) or "skipped" (no compiler for it here).
        registers: 32-bit registers per thread.
        instructions: None where no disassembler is at hand.
        roofline: None where no card of the architecture is catalogued, or no work is declared.
    """

    function: str
    arch: str
    status: str
    reason: str = ""
    compiler: str = ""
    threads: int = 0
    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    dynamic_shared_bytes: int = 0
    occupancy: KernelOccupancy | None = None
    instructions: InstructionMix | None = None
    roofline: KernelRoofline | None = None
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KernelAccess:
    """What warps ask of memory at one line, from executed blocks.

    Attributes:
        where: "file:line".
        space: "global" or "shared".
        buffer: The argument; "" for shared memory.
        operation: "load", "store" or "atomic".
        bytes: Of one lane.
        requests: How often a warp came by in the blocks that ran.
        factor: Sectors (global) or wavefronts (shared) over those needed; 1 is best. For atomic
            operations the lanes that meet on one address.
        stride_bytes: From lane to lane; None where it varies.
    """

    where: str
    space: str
    buffer: str
    operation: str
    bytes: int
    requests: int
    factor: float
    stride_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class KernelLimiter:
    """What bounds a kernel on a card, by a static model of its units; no timing.

    Attributes:
        name: "bank conflicts", "uncoalesced access", "atomic contention", "memory bandwidth",
            "arithmetic", "shared memory bandwidth" or "cache bandwidth".
        gpu: The card that the model used.
        text: One line, with the place in the code.
        unit_ms: Milliseconds that each unit would need by itself.
    """

    name: str
    gpu: str
    text: str
    unit_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CopySlot:
    """One piece of work in the simulated timeline.

    Attributes:
        stream: From 0.
        what: "host_to_device", "kernel" or "device_to_host".
        chunk: From 0.
    """

    stream: int
    what: str
    chunk: int
    begin_ms: float
    end_ms: float


@dataclass(frozen=True, kw_only=True)
class CopyOverlap:
    """Copies and kernel with several streams, simulated from a card's figures.

    Attributes:
        streams: How many.
        total_ms: With them.
        serial_ms: With one stream and no overlap.
        assumptions: Which figures were used.
    """

    gpu: str
    streams: int
    chunks: int
    host_to_device_bytes: int
    device_to_host_bytes: int
    serial_ms: float
    total_ms: float
    slots: tuple[CopySlot, ...]
    assumptions: str


@dataclass(frozen=True, kw_only=True)
class KernelExplainResult:
    """What `suanli kernel explain` found. Nothing in it was timed.

    Attributes:
        accesses: From the execution of a few blocks on the CPU; empty for Triton.
        limiter: None where accesses or work are not known.
        findings: What costs time.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    kernel: str
    language: str
    sizes: dict[str, int]
    dtype: str
    config: dict[str, int]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    archs: tuple[KernelArch, ...]
    accesses: tuple[KernelAccess, ...] = ()
    findings: tuple[KernelFinding, ...] = ()
    limiter: KernelLimiter | None = None
    overlap: tuple[CopyOverlap, ...] = ()
    notes: tuple[str, ...] = ()
    seconds_spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KernelTrial:
    """One configuration of `suanli kernel tune`.

    Attributes:
        status: "verified", "rejected", "failed", "pruned" or "ranked" (judged, not run).
        predicted_ms: By the static model, for ordering only.
    """

    config: dict[str, int]
    status: str
    reason: str = ""
    step_ms: Estimate | None = None
    predicted_ms: float | None = None
    occupancy: float | None = None
    limited_by: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelRival:
    """The winner against something else that computes the same, in alternation."""

    name: str
    step_ms: Estimate
    winner_ms: Estimate
    speedup: Estimate


@dataclass(frozen=True, kw_only=True)
class KernelTuneResult:
    """What `suanli kernel tune` found.

    Attributes:
        ranking: Whether nothing was timed; then `config` is a guess by the static model.
        config: The winner; None where nothing can be used.
        interrupted: Whether Ctrl-C ended the search; the same call goes on with it.
    """

    schema: SchemaName
    verb: str
    workload: str
    device: DeviceInfo
    environment: Environment
    kernel: str
    sizes: dict[str, int]
    dtype: str
    where: str
    ranking: bool
    verified: bool
    config: dict[str, int] | None
    step_ms: Estimate | None
    trials: tuple[KernelTrial, ...]
    rivals: tuple[KernelRival, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    seconds_spent: float = 0.0
