"""What a compiler said of one kernel for one architecture. The same record for CUDA and Triton."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel, compiled for one architecture. Nothing here needs a GPU.

    Attributes:
        name: The entry point.
        arch: "sm_90" and the like.
        compiler: Name and version, such as "triton 3.9.0".
        threads: Threads per block that it was compiled for; 0 where the launch decides.
        registers: 32-bit registers per thread, before rounding to the allocation unit.
        spill_store_bytes: Bytes that a thread writes to local memory for want of registers.
        spill_load_bytes: Bytes that it reads back.
        stack_bytes: Bytes of local memory per thread, spills and arrays together.
        static_shared_bytes: Shared memory per block that the code declares.
        dynamic_shared_bytes: Shared memory per block that the launch adds.
        cubin: Path of the machine code; "" where it was not kept.
        seconds: Wall time of the compilation.
        blocks: Blocks of the launch that it was compiled for; 0 where that is not known.
        constants: Compile-time values and options by name.
    """

    name: str
    arch: str
    compiler: str
    registers: int
    threads: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    dynamic_shared_bytes: int = 0
    cubin: str = ""
    seconds: float = 0.0
    blocks: int = 0
    constants: dict[str, str] = field(default_factory=dict)

    @property
    def shared_bytes(self) -> int:
        """Shared memory per block, static and dynamic together."""
        return self.static_shared_bytes + self.dynamic_shared_bytes

    @property
    def spills(self) -> bool:
        """Whether a thread keeps values in local memory for want of registers."""
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0
