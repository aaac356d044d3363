"""Layer 7: the verbs of `suanli kernel` in Python."""

from collections.abc import Sequence

from suanli.base.events import Listener, ignore
from suanli.base.kernel_results import KernelCheckResult, KernelExplainResult, KernelTuneResult


def kernel_explain(
    ref: str,
    *,
    archs: Sequence[str] = (),
    gpu: str | None = None,
    dtype: str | None = None,
    timeout_s: float = 60.0,
    on_event: Listener = ignore,
) -> KernelExplainResult:
    """Say what a kernel needs on each architecture and what bounds it, with no GPU.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        archs: Such as ("sm_80", "sm_90"); sm_80, sm_90 and sm_100 where empty.
        gpu: The card for limiter and streams, such as "H100 SXM5 80GB".
        dtype: Of the main input; by default the kernel's first, and bf16 for Triton that takes it.
        timeout_s: Limit of one compilation.
        on_event: Told what is going on.

    Raises:
        BadInputError: Kernel, architecture, card or dtype is unknown, or the kernel does not
            compile.
        MissingBackendError: No compiler for the kernel is installed.
    """
    from suanli.kernels import verbs

    return verbs.kernel_explain(
        ref, archs=archs, gpu=gpu, dtype=dtype, timeout_s=timeout_s, listener=on_event
    )


def kernel_check(
    ref: str,
    *,
    device: str = "auto",
    seed: int = 0,
    timeout_s: float = 120.0,
    on_event: Listener = ignore,
) -> KernelCheckResult:
    """Hold a kernel to its reference: on a GPU where there is one, on the CPU elsewhere.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        device: "cpu", "cuda:0", or "auto".
        seed: Of the inputs.
        timeout_s: Limit of one launch.
        on_event: Told what is going on.

    Raises:
        BadInputError: The kernel is unknown, has no reference, does not compile, or its launch is
            over a limit.
        MissingBackendError: What executes it is absent.
    """
    from suanli.kernels import verbs

    return verbs.kernel_check(ref, device=device, seed=seed, timeout_s=timeout_s, listener=on_event)


def kernel_tune(
    ref: str,
    *,
    gpu: str | None = None,
    dtype: str | None = None,
    most: int = 400,
    timeout_s: float = 60.0,
    budget_s: float = 600.0,
    fresh: bool = False,
    on_event: Listener = ignore,
) -> KernelTuneResult:
    """Find a kernel's fastest right configuration; without a GPU, rank them and say so.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        gpu: A card to rank for; None is this machine's GPU, or an H200 where there is none.
        dtype: Of the main input.
        most: Configurations that are compiled at most.
        timeout_s: Limit of one compilation; a timing on a GPU gets twice, a check five times and a
            race with a rival ten times as much.
        budget_s: For the whole; no trial is begun after it.
        fresh: Whether to begin anew where an earlier call was cut short, by Ctrl-C or its budget.
        on_event: Told what is going on.

    Raises:
        BadInputError: Kernel or card is unknown, or there is nothing to tune.
        MissingBackendError: No compiler for the kernel is installed.
    """
    from suanli.kernels import verbs
    from suanli.kernels.tuning import SearchLimits

    limits = SearchLimits(most=most, timeout_s=timeout_s, budget_s=budget_s)
    return verbs.kernel_tune(
        ref, gpu=gpu, dtype=dtype, limits=limits, fresh=fresh, listener=on_event
    )
