"""The verbs of `suanli kernel` as records: explain, check and tune, for CUDA C++ and Triton."""

import time
from collections.abc import Iterable, Sequence

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener, ignore
from suanli.base.hardware import DeviceInfo
from suanli.base.kernel_results import (
    KernelCase,
    KernelCheckResult,
    KernelExplainResult,
    KernelRival,
    KernelTrial,
    KernelTuneResult,
)
from suanli.devices import device as open_device
from suanli.devices import device_names, find_sheet
from suanli.kernels.benches import own_sheet
from suanli.kernels.checking import BF16
from suanli.kernels.cuda.acceptance import refusals
from suanli.kernels.cuda.bench import CudaGpuBench, CudaStaticBench
from suanli.kernels.cuda.checking import check_cuda
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.declaration import Declaration, Sizes
from suanli.kernels.explain import DEFAULT_ARCHS, explain, find
from suanli.kernels.gpu_check import as_case, check_on_gpu
from suanli.kernels.isolated import CheckRequest, check_isolated
from suanli.kernels.spec import CudaKernel, calling
from suanli.kernels.tune_kernel import search, tune_kernel
from suanli.kernels.tuning import SearchLimits, TuneResult, configurations
from suanli.measure.environment import environment

# What is ranked for where this machine has no GPU and none is named.
DEFAULT_CARD = "H200 SXM 141GB"
_HOST_NOTE = (
    "CUDA C++ was executed on the CPU, thread by thread: values, bounds, barriers and races are "
    "judged; the fast forms of functions (__expf) are computed accurately, and time is not judged"
)


def kernel_explain(
    ref: str,
    *,
    archs: Sequence[str] = (),
    gpu: str | None = None,
    dtype: str | None = None,
    timeout_s: float = 60.0,
    listener: Listener = ignore,
) -> KernelExplainResult:
    """`suanli kernel explain`.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        archs: Architectures; sm_80, sm_90 and sm_100 where empty.
        gpu: The card for limiter and streams.
        dtype: Of the main input; by default the kernel's first, and bf16 for Triton that takes it.
        timeout_s: Limit of one compilation.
        listener: Told of progress.

    Raises:
        BadInputError: Kernel, architecture, card or dtype is unknown, or the kernel does not
            compile.
        MissingBackendError: No compiler for the kernel is installed.
    """
    begin = time.perf_counter()
    made = explain(
        ref,
        archs=archs or DEFAULT_ARCHS,
        gpu=gpu,
        dtype=dtype,
        timeout_s=timeout_s,
        listener=listener,
    )
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return KernelExplainResult(
        schema=schema.name("kernel-explain"),
        verb="kernel explain",
        workload=ref,
        device=_device("cpu"),
        environment=environment(),
        seconds_spent=time.perf_counter() - begin,
        **fields,
    )


def kernel_check(
    ref: str,
    *,
    device: str = "auto",
    seed: int = 0,
    timeout_s: float = 120.0,
    listener: Listener = ignore,
) -> KernelCheckResult:
    """`suanli kernel check`.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        device: "cpu", "cuda:0", or "auto" for the first GPU where there is one.
        seed: Of the inputs.
        timeout_s: Limit of one launch.
        listener: Told of progress.

    Raises:
        BadInputError: The kernel is unknown, has no reference, does not compile, or its launch is
            over a limit.
        MissingBackendError: What executes it is absent.
    """
    begin = time.perf_counter()
    kernel = find(ref)
    name = _chosen(device)
    notes: list[str] = []
    if isinstance(kernel, CudaKernel):
        cuda = kernel
        cases = calling(
            cuda, lambda: check_cuda(cuda, seed=seed, timeout_s=timeout_s, listener=listener)
        )
        notes.append(_HOST_NOTE)
        if name == "cpu":
            refused, unknown = calling(cuda, lambda: refusals(cuda, timeout_s, listener))
            cases += refused
            notes += unknown
        else:
            cases += check_on_gpu(ref, declaration(kernel), name, seed=seed, listener=listener)
    elif name == "cpu":
        cases = _interpreted(ref, kernel, seed, timeout_s, listener)
        notes.append("Triton's interpreter executed it: an answer on a GPU can still differ")
    else:
        cases = check_on_gpu(ref, kernel, name, seed=seed, listener=listener)
    if name == "cpu":
        notes.append("unverified on a GPU: there is none here, or another device was asked for")
    judged = [case for case in cases if case.status != "refused"]
    return KernelCheckResult(
        schema=schema.name("kernel-check"),
        verb="kernel check",
        workload=ref,
        device=_device(name),
        environment=environment(),
        kernel=kernel.name,
        language="CUDA C++" if isinstance(kernel, CudaKernel) else "Triton",
        ok=bool(judged) and all(case.status == "verified" for case in judged),
        cases=tuple(cases),
        notes=tuple(notes),
        seconds_spent=time.perf_counter() - begin,
    )


def _interpreted(
    ref: str, kernel: Declaration, seed: int, timeout_s: float, listener: Listener
) -> list[KernelCase]:
    requests = [
        CheckRequest(sizes=sizes, dtype=dtype, seed=seed + index)
        for index, sizes in enumerate(kernel.check_sizes)
        for dtype in kernel.dtypes
    ]
    listener(Event(kind="step", text=f"checking {kernel.name} in Triton's interpreter"))
    plain = [request for request in requests if request.dtype != "bf16"]
    cases = [as_case(c) for c in check_isolated(ref, kernel, plain, timeout_s=timeout_s)]
    return cases + [
        KernelCase(
            sizes=dict(request.sizes),
            dtype="bf16",
            config=dict(kernel.default_for(request.sizes, "bf16")),
            where="interpreter on CPU",
            status="refused",
            reason=BF16,
        )
        for request in requests
        if request.dtype == "bf16"
    ]


def kernel_tune(
    ref: str,
    *,
    gpu: str | None = None,
    dtype: str | None = None,
    limits: SearchLimits | None = None,
    fresh: bool = False,
    listener: Listener = ignore,
) -> KernelTuneResult:
    """`suanli kernel tune`.

    On a GPU of this machine configurations are timed, verified and raced; elsewhere, or with a
    card named, they are ranked by the static model, and the result says so.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        gpu: A card to rank for.
        dtype: Of the main input.
        limits: Of configurations and time.
        fresh: Whether trials of a run that was cut short are forgotten; else it goes on with them.
        listener: Told of progress.

    Raises:
        BadInputError: Kernel, dtype or card is unknown, the kernel has nothing to tune, none of
            its configurations compiles, or the limits leave no room for one.
        MissingBackendError: No compiler for the kernel is installed.
    """
    begin = time.perf_counter()
    kernel = find(ref)
    cards = [name for name in device_names() if name.startswith("cuda")]
    if gpu is None and not cards:
        gpu = DEFAULT_CARD
    if dtype is not None and dtype not in kernel.dtypes:
        raise BadInputError(
            f"{kernel.name} does not take {dtype}", next_step=f"it takes {', '.join(kernel.dtypes)}"
        )
    limits = limits or SearchLimits()
    limits.check()
    if not kernel.tunables:
        raise BadInputError(f"{kernel.name} names no tunables, so there is nothing to tune")
    if isinstance(kernel, CudaKernel):
        cuda = kernel
        chosen = dtype or cuda.dtypes[0]
        found = calling(
            cuda,
            lambda: _tuned_cuda(
                ref, cuda, chosen, gpu, cards, limits=limits, fresh=fresh, listener=listener
            ),
        )
    else:
        found = tune_kernel(
            ref, dtype=dtype, gpu=gpu, limits=limits, fresh=fresh, listener=listener
        )
    if found.trials and all(trial.status == "failed" for trial in found.trials):
        raise BadInputError(found.trials[0].reason)
    return _tune_record(ref, found, cards[0] if cards and gpu is None else "cpu", begin)


def _tuned_cuda(
    ref: str,
    kernel: CudaKernel,
    dtype: str,
    gpu: str | None,
    cards: Sequence[str],
    *,
    limits: SearchLimits,
    fresh: bool,
    listener: Listener,
) -> TuneResult:
    sizes: Sizes = dict(kernel.bench_sizes[0])
    timeout = limits.timeout_s
    candidates = configurations(
        kernel.tunables, lambda config: kernel.legal(config, sizes), kernel.default_config(sizes)
    )
    bench: CudaStaticBench | CudaGpuBench
    if gpu is not None:
        bench = CudaStaticBench(kernel, sizes, dtype, find_sheet(gpu), timeout_s=timeout)
    else:
        bench = CudaGpuBench(
            ref, kernel, sizes, dtype, own_sheet(), device=cards[0], timeout_s=timeout
        )
    with bench:
        return search(
            declaration(kernel),
            sizes,
            dtype,
            candidates,
            bench,
            limits=limits,
            fresh=fresh,
            listener=listener,
        )


def _tune_record(ref: str, found: TuneResult, device: str, begin: float) -> KernelTuneResult:
    return KernelTuneResult(
        schema=schema.name("kernel-tune"),
        verb="kernel tune",
        workload=ref,
        device=_device(device),
        environment=environment(),
        kernel=found.kernel,
        sizes=found.sizes,
        dtype=found.dtype,
        where=found.where,
        ranking=found.ranking,
        verified=found.verified,
        config=found.config,
        step_ms=found.step_ms,
        trials=tuple(
            KernelTrial(
                config=trial.config,
                status=trial.status,
                reason=trial.reason,
                step_ms=trial.step_ms,
                predicted_ms=trial.static.predicted_ms,
                occupancy=trial.static.occupancy,
                limited_by=trial.static.limited_by,
            )
            for trial in found.trials
        ),
        rivals=tuple(
            KernelRival(
                name=name, step_ms=race.rival_ms, winner_ms=race.winner_ms, speedup=race.speedup
            )
            for name, race in found.races.items()
        ),
        notes=_notes(found.note),
        interrupted=found.interrupted,
        seconds_spent=time.perf_counter() - begin,
    )


def _notes(*texts: str) -> tuple[str, ...]:
    return tuple(text for text in texts if text)


def _chosen(device: str) -> str:
    known: Iterable[str] = device_names()
    if device == "auto":
        return next((name for name in known if name.startswith("cuda")), "cpu")
    return open_device(device).info.name


def _device(name: str) -> DeviceInfo:
    return open_device(name).info
