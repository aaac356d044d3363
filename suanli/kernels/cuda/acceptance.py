"""Whether NVIDIA's compiler and a card would take a kernel that runs on the CPU."""

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.events import Event, Listener, ignore
from suanli.base.kernel_results import KernelCase
from suanli.kernels.cuda.compile import compile_cuda
from suanli.kernels.cuda.toolkit import INSTALL
from suanli.kernels.occupancy import lift, occupancy
from suanli.kernels.spec import CudaKernel

# What `__CUDA_ARCH__` says in the execution on the CPU.
ARCH = "sm_80"
_ABSENT = "whether NVIDIA's compiler takes it is not known: none is installed"


def refusals(
    kernel: CudaKernel, timeout_s: float = 60.0, listener: Listener = ignore
) -> tuple[list[KernelCase], list[str]]:
    """What the compiler of the CPU lets pass and NVIDIA's does not, as failed cases; and notes.

    `atomicMin` of a float, 64 KB of static shared memory or a call of a function of the host run
    on the CPU well enough. Each dtype is compiled once, with the default configuration.

    Args:
        kernel: Which.
        timeout_s: Limit of one compilation.
        listener: Told of progress.

    Raises:
        BadInputError: The launch is over a limit.
    """
    cases: list[KernelCase] = []
    sizes = kernel.check_sizes[0]
    config = kernel.default_config(sizes)
    for dtype in kernel.dtypes:
        listener(Event(kind="step", text=f"compiling {kernel.name} in {dtype} for {ARCH}"))
        try:
            reason = _reason(kernel, dtype, timeout_s)
        except MissingBackendError:
            return cases, [f"{_ABSENT} ({INSTALL})"]
        if reason:
            cases.append(
                KernelCase(
                    sizes=dict(sizes),
                    dtype=dtype,
                    config=dict(config),
                    where=f"compiled for {ARCH}",
                    status="failed",
                    reason=reason,
                )
            )
    return cases, []


def _reason(kernel: CudaKernel, dtype: str, timeout_s: float) -> str:
    sizes = kernel.check_sizes[0]
    try:
        made = compile_cuda(
            kernel,
            ARCH,
            sizes=sizes,
            config=kernel.default_config(sizes),
            dtype=dtype,
            timeout_s=timeout_s,
        ).record
    except MissingBackendError:
        raise
    except SuanliError as wrong:
        return str(wrong)
    needs = {
        "threads": made.threads,
        "registers": made.registers,
        "static_shared_bytes": made.static_shared_bytes,
        "dynamic_shared_bytes": made.dynamic_shared_bytes,
    }
    found = occupancy(ARCH, **needs)
    if found.blocks:
        return ""
    return f"no block fits on {ARCH} for its {found.limited_by}: it takes {lift(ARCH, **needs)}"
