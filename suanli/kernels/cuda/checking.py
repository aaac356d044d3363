"""Is a CUDA kernel right? Executed on the CPU, watched, and held to its reference in fp64."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from suanli.base.errors import TrialFailedError
from suanli.base.events import Event, Listener, ignore
from suanli.base.kernel_results import KernelCase, KernelFinding
from suanli.kernels.checking import Judgement, judge
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.cuda.findings import costs, errors
from suanli.kernels.cuda.host_build import build
from suanli.kernels.cuda.host_run import HostRun, run
from suanli.kernels.cuda.source import Refusal
from suanli.kernels.declaration import Config, Inputs, Sizes
from suanli.kernels.dtypes import torch_dtype
from suanli.kernels.spec import CudaKernel

WHERE = "host execution on CPU"


def check_cuda(
    kernel: CudaKernel, *, seed: int = 0, timeout_s: float = 60.0, listener: Listener = ignore
) -> list[KernelCase]:
    """Check a kernel at all its shapes and dtypes, with its default and its last configuration.

    Each case is run twice, with blocks and threads in order and in the opposite order, so that an
    answer which depends on the schedule shows.

    Args:
        kernel: What to check.
        seed: Of the inputs.
        timeout_s: Limit of one launch.
        listener: Told of progress.

    Raises:
        BadInputError: The kernel has no reference, does not compile, or its launch is over a limit.
        MissingBackendError: There is no C++ compiler.
    """
    kernel.need_reference()
    cases = []
    for index, sizes in enumerate(kernel.check_sizes):
        for dtype in kernel.dtypes:
            for config in _configurations(kernel, sizes):
                shape = ", ".join(f"{k}={v}" for k, v in sizes.items())
                listener(Event(kind="step", text=f"checking {kernel.name} at {shape} in {dtype}"))
                cases.append(_case(kernel, sizes, dtype, config, (seed + index, timeout_s)))
    return cases


def check_config(
    kernel: CudaKernel, config: Config, dtype: str, *, seed: int = 0, timeout_s: float = 60.0
) -> list[KernelCase]:
    """Check one configuration at all the shapes where it is legal.

    Args:
        kernel: What to check.
        config: The configuration.
        dtype: Of the main input.
        seed: Of the inputs.
        timeout_s: Limit of one launch.

    Raises:
        BadInputError: The kernel has no reference, does not compile, or its launch is over a limit.
        MissingBackendError: There is no C++ compiler.
    """
    kernel.need_reference()
    return [
        _case(kernel, sizes, dtype, config, (seed + index, timeout_s))
        for index, sizes in enumerate(kernel.check_sizes)
        if kernel.legal(config, sizes)
    ]


def _configurations(kernel: CudaKernel, sizes: Sizes) -> list[dict[str, int]]:
    """The default configuration and the one furthest from it in the list."""
    default = kernel.default_config(sizes)
    last = [config for config in kernel.configurations(sizes) if config != default][-1:]
    return [default, *last]


def _case(
    kernel: CudaKernel, sizes: Sizes, dtype: str, config: Config, options: tuple[int, float]
) -> KernelCase:
    begin = time.perf_counter()
    seed, timeout_s = options
    file = kernel.source_path().name

    def made(
        status: str, reason: str, found: Sequence[KernelFinding] = (), printed: str = ""
    ) -> KernelCase:
        return KernelCase(
            printed=printed,
            sizes=dict(sizes),
            dtype=dtype,
            config=dict(config),
            where=WHERE,
            status=status,
            reason=reason,
            findings=tuple(found),
            seconds_spent=time.perf_counter() - begin,
        )

    try:
        built = build(kernel, sizes, config, dtype, timeout_s=timeout_s)
        inputs = kernel.make_inputs(sizes, torch_dtype(dtype), "cpu", seed)
        runs = [
            run(
                kernel,
                built,
                inputs,
                config=config,
                dtype=torch_dtype(dtype),
                backwards=backwards,
                timeout_s=timeout_s,
            )
            for backwards in (False, True)
        ]
    except Refusal as refusal:
        line = kernel.first_line() + refusal.line - 1
        return made("refused", f"{file}:{line}: {refusal}")
    except TrialFailedError as failure:
        return made("failed", str(failure))
    found = [*errors(kernel, runs), *costs(kernel, runs[0].places)]
    refused = [finding for finding in found if finding.kind == "refused"]
    wrong = [f for f in found if f.severity == "error" and f.kind not in ("refused", "unwritten")]
    if refused and not wrong:
        return made("refused", _words(refused[0]), found, runs[0].printed)
    return _judged(kernel, inputs, runs, made("verified", "", found, runs[0].printed))


def _judged(
    kernel: CudaKernel, inputs: Inputs, runs: Sequence[HostRun], case: KernelCase
) -> KernelCase:
    wrong = [finding for finding in case.findings if finding.severity == "error"]
    stated = declaration(kernel)
    judged = [judge(stated, inputs, r.outputs) for r in runs]
    worst: Judgement = max(judged, key=lambda j: j.share)
    reason = _words(wrong[0]) if wrong else next((j.reason for j in judged if j.reason), "")
    return replace(
        case,
        status="rejected" if reason else "verified",
        reason=reason,
        error_share=worst.share if math.isfinite(worst.share) else None,
        max_abs_error=worst.max_abs if math.isfinite(worst.max_abs) else None,
    )


def _words(finding: KernelFinding) -> str:
    return f"{finding.where}: {finding.text}" if finding.where else finding.text
