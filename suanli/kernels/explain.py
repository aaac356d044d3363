"""What a kernel needs and what bounds it, on any architecture, with no GPU: nothing is timed."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from suanli.base.errors import (
    BadInputError,
    MissingBackendError,
    TrialFailedError,
)
from suanli.base.events import Event, Listener, ignore
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.kernel_results import (
    CopyOverlap,
    KernelAccess,
    KernelArch,
    KernelFinding,
    KernelLimiter,
    KernelOccupancy,
    KernelRoofline,
)
from suanli.devices import catalogue, find_sheet
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda.compile import check_arch, compile_cuda
from suanli.kernels.cuda.findings import accesses, costs
from suanli.kernels.cuda.host_build import build
from suanli.kernels.cuda.host_run import HostRun, run
from suanli.kernels.cuda.sass import instruction_mix
from suanli.kernels.cuda.source import Refusal
from suanli.kernels.cuda.toolkit import INSTALL
from suanli.kernels.declaration import DTYPES, KernelWork, tensors
from suanli.kernels.dtypes import item_bytes, torch_dtype
from suanli.kernels.isolated import Compilation, CompileRequest
from suanli.kernels.limiter import limiter
from suanli.kernels.occupancy import lift, occupancy
from suanli.kernels.overlap import pcie_bytes_per_s, simulate
from suanli.kernels.shipped import shipped_kernel
from suanli.kernels.spec import CudaKernel, Kernel, calling, load
from suanli.kernels.static_model import clock_hz

DEFAULT_ARCHS = ("sm_80", "sm_90", "sm_100")
# So many threads, in three to six blocks, are executed to see what warps ask of memory.
_TRACED_THREADS, _TRACED_BLOCKS = 2048, (3, 6)
_STREAMS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What was found out of a kernel; the fields are those of `KernelExplainResult`."""

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


def find(ref: str) -> Kernel:
    """A kernel that ships by its name, or one in a file.

    Raises:
        BadInputError: There is no such kernel.
    """
    file = ref.rpartition(":")[0] if ".py:" in ref else ref
    return load(ref) if file.endswith(".py") else shipped_kernel(ref)


def explain(
    ref: str,
    *,
    archs: Sequence[str] = DEFAULT_ARCHS,
    gpu: str | None = None,
    dtype: str | None = None,
    timeout_s: float = 60.0,
    listener: Listener = ignore,
) -> Explained:
    """Compile a kernel for each architecture, and trace some of its blocks on the CPU.

    Args:
        ref: "file.py", "file.py:name", or a kernel that ships.
        archs: Such as ("sm_80", "sm_90").
        gpu: The card for limiter and streams; by default the fastest catalogued card of the last
            architecture that has one.
        dtype: Of the main input; by default the kernel's first, and bf16 for Triton that takes it.
        timeout_s: Limit of one compilation.
        listener: Told of progress.

    Raises:
        BadInputError: The kernel, an architecture, the card or the dtype is unknown, the kernel
            does not compile, or its launch is over a limit.
        MissingBackendError: No compiler for the kernel is installed.
    """
    for arch in archs:
        check_arch(arch)
    kernel = find(ref)
    chosen = find_sheet(gpu) if gpu else _card(archs)
    if dtype is not None and dtype not in kernel.dtypes:
        raise BadInputError(
            f"{kernel.name} does not take {dtype}", next_step=f"it takes {', '.join(kernel.dtypes)}"
        )
    if isinstance(kernel, CudaKernel):
        cuda = kernel
        return calling(
            cuda, lambda: _Cuda(cuda, chosen, dtype, timeout_s, listener).explained(archs)
        )
    sizes = dict(kernel.bench_sizes[0])
    dtype = dtype or ("bf16" if "bf16" in kernel.dtypes else kernel.dtypes[0])
    work = kernel.work(sizes, item_bytes(dtype))
    rows: list[KernelArch] = []
    with (
        tempfile.TemporaryDirectory(prefix="suanli-explain-") as folder,
        Compilation(ref, timeout_s=timeout_s, keep=Path(folder)) as compilation,
    ):
        for arch in archs:
            listener(Event(kind="step", text=f"compiling {kernel.name} for {arch}"))
            request = CompileRequest(sizes=sizes, dtype=dtype, arch=arch)
            made = compilation.compile(request)
            if made.reason:
                rows.append(
                    KernelArch(function=kernel.name, arch=arch, status="failed", reason=made.reason)
                )
            rows += [_row(f, _code(f), work, dtype) for f in made.functions]
    _need_one(rows)
    inputs = kernel.inputs(sizes, DTYPES[dtype], "meta", 0)
    copies = sum(t.numel() * t.element_size() for t in tensors(inputs).values())
    overlap = _overlap(chosen, work, (copies, work.bytes_written), _sol_ms(work, chosen, dtype))
    return Explained(
        kernel=kernel.name,
        language="Triton",
        sizes=sizes,
        dtype=dtype,
        config=dict(kernel.default_for(sizes, dtype)),
        grid=(),
        block=(),
        archs=tuple(rows),
        overlap=overlap,
        findings=tuple(_compiled_findings(rows)),
        notes=("memory accesses are traced for CUDA C++ only",),
    )


def _code(function: CompiledKernel) -> bytes:
    return Path(function.cubin).read_bytes() if function.cubin else b""


class _Cuda:
    """One explanation of a CUDA kernel."""

    def __init__(
        self,
        kernel: CudaKernel,
        card: GpuSheet | None,
        dtype: str | None,
        timeout_s: float,
        listener: Listener,
    ) -> None:
        self._kernel, self._card = kernel, card
        self._timeout_s, self._listener = timeout_s, listener
        self._sizes = dict(kernel.bench_sizes[0])
        self._dtype = dtype or kernel.dtypes[0]
        self._config = kernel.default_config(self._sizes)
        self._launch = kernel.launch_at(self._sizes, self._config)
        work = kernel.work
        self._work = work(self._sizes, item_bytes(self._dtype)) if work else None
        self._notes: list[str] = []

    def explained(self, archs: Sequence[str]) -> Explained:
        rows = [self._compiled(arch) for arch in archs]
        _need_one(rows)
        traced = self._traced()
        found = _compiled_findings(rows)
        seen: Sequence[KernelAccess] = ()
        bound = None
        if traced is not None:
            seen = accesses(self._kernel, traced.places)
            found = [*costs(self._kernel, traced.places), *found]
            bound = self._limiter(rows, traced, seen)
        return Explained(
            kernel=self._kernel.name,
            language="CUDA C++",
            sizes=self._sizes,
            dtype=self._dtype,
            config=self._config,
            grid=self._launch.grid,
            block=self._launch.block,
            archs=tuple(rows),
            accesses=tuple(seen),
            findings=tuple(found),
            limiter=bound,
            overlap=self._streams(bound),
            notes=tuple(self._notes),
        )

    def _compiled(self, arch: str) -> KernelArch:
        self._listener(Event(kind="step", text=f"compiling {self._kernel.name} for {arch}"))
        try:
            made = compile_cuda(
                self._kernel,
                arch,
                sizes=self._sizes,
                config=self._config,
                dtype=self._dtype,
                timeout_s=self._timeout_s,
            )
        except (MissingBackendError, BadInputError) as wrong:
            status = "skipped" if isinstance(wrong, MissingBackendError) else "failed"
            return KernelArch(
                function=self._kernel.function, arch=arch, status=status, reason=str(wrong)
            )
        return _row(made.record, made.code, self._work, self._dtype)

    def _traced(self) -> HostRun | None:
        """Some blocks of the real launch, executed on the CPU; None with a note where not."""
        self._listener(Event(kind="step", text=f"tracing {self._kernel.name} on the CPU"))
        try:
            built = build(
                self._kernel, self._sizes, self._config, self._dtype, timeout_s=self._timeout_s
            )
            dtype = torch_dtype(self._dtype)
            least, most = _TRACED_BLOCKS
            blocks = max(least, min(most, _TRACED_THREADS // self._launch.threads))
            return run(
                self._kernel,
                built,
                self._kernel.make_inputs(self._sizes, dtype, "cpu", 0),
                config=self._config,
                dtype=dtype,
                only_blocks=blocks,
                timeout_s=self._timeout_s,
            )
        except (Refusal, TrialFailedError, MissingBackendError) as reason:
            self._notes.append(f"memory accesses are not known: {reason}")
            return None

    def _limiter(
        self, rows: Sequence[KernelArch], traced: HostRun, seen: Sequence[KernelAccess]
    ) -> KernelLimiter | None:
        if self._work is None or self._card is None:
            self._notes.append("the limiter is not known: no work is declared, or no card is known")
            return None
        mixes = [row.instructions for row in rows if row.instructions is not None]
        matrix = any(mix.tensor_core for mix in mixes) if mixes else self._work.matmul
        found = limiter(
            self._card,
            work=self._work,
            rate_dtype=_rate(self._dtype, matrix),
            places=traced.places,
            accesses=seen,
            scale=self._launch.blocks / max(1, traced.blocks),
        )
        if found is None:
            self._notes.append(
                f"the limiter is not known: the sheet of {self._card.name} is not whole"
            )
        return found

    def _streams(self, bound: KernelLimiter | None) -> tuple[CopyOverlap, ...]:
        if self._work is None or self._card is None:
            return ()
        kernel_ms = _sol_ms(self._work, self._card, self._dtype)
        if bound is not None:
            kernel_ms = max(bound.unit_ms.values())
        inputs = self._kernel.make_inputs(self._sizes, torch_dtype(self._dtype), "meta", 0)
        to_card = sum(t.numel() * t.element_size() for t in tensors(inputs).values())
        shapes = self._kernel.outputs(self._sizes, torch_dtype(self._dtype)).values()
        back = sum(math.prod(shape) * kind.itemsize for shape, kind in shapes)
        given = [inputs[name] for name in self._kernel.writes]
        back += sum(t.numel() * t.element_size() for t in given if isinstance(t, torch.Tensor))
        return _overlap(self._card, self._work, (to_card, back), kernel_ms)


def _need_one(rows: Sequence[KernelArch]) -> None:
    """Raise the first reason if no architecture took the kernel."""
    if any(row.status == "compiled" for row in rows) or not rows:
        return
    if all(row.status == "skipped" for row in rows):
        raise MissingBackendError("a CUDA compiler for these architectures", INSTALL)
    raise BadInputError(next(row.reason for row in rows if row.status == "failed"))


def _row(function: CompiledKernel, code: bytes, work: KernelWork | None, dtype: str) -> KernelArch:
    given: dict[str, Any] = {
        "threads": function.threads,
        "registers": function.registers,
        "static_shared_bytes": function.static_shared_bytes,
        "dynamic_shared_bytes": function.dynamic_shared_bytes,
    }
    share = occupancy(function.arch, **given)
    if share.blocks == 0:
        return KernelArch(
            function=function.name,
            arch=function.arch,
            status="failed",
            reason=(
                f"{function.name} does not fit on {function.arch}: its {share.limited_by} must be "
                f"less; it takes {lift(function.arch, **given)}"
            ),
            compiler=function.compiler,
            **given,
        )
    mix = instruction_mix(code, function.name) if code else None
    return KernelArch(
        function=function.name,
        arch=function.arch,
        status="compiled",
        compiler=function.compiler,
        spill_store_bytes=function.spill_store_bytes,
        spill_load_bytes=function.spill_load_bytes,
        stack_bytes=function.stack_bytes,
        occupancy=KernelOccupancy(
            blocks=share.blocks,
            warps=share.warps,
            fraction=share.fraction,
            limited_by=share.limited_by,
            lift=lift(function.arch, **given),
        ),
        instructions=mix,
        roofline=_roofline(function.arch, work, dtype),
        seconds_spent=function.seconds,
        **given,
    )


def _compiled_findings(rows: Sequence[KernelArch]) -> list[KernelFinding]:
    """Spills, each function once."""
    found: dict[str, KernelFinding] = {}
    for row in rows:
        moved = row.spill_store_bytes + row.spill_load_bytes
        if moved and row.function not in found:
            found[row.function] = KernelFinding(
                kind="spills",
                severity="warning",
                where="",
                text=(
                    f"{row.function} spills on {row.arch}: {row.spill_store_bytes} bytes stored, "
                    f"{row.spill_load_bytes} loaded a thread; use fewer live values or more threads"
                ),
            )
    return list(found.values())


def _rate(dtype: str, matrix: bool) -> str:
    """Whose rate the arithmetic runs at."""
    if not matrix:
        return "fp32"
    return "tf32" if dtype == "fp32" else dtype


def _roofline(arch: str, work: KernelWork | None, dtype: str) -> KernelRoofline | None:
    gpu = _card((arch,))
    if work is None or gpu is None or not work.bytes or not gpu.memory_bytes_per_s:
        return None
    rate = _rate(dtype, work.matmul)
    flops = gpu.flops(rate) or gpu.flops("fp32")
    if not flops:
        return None
    intensity, ridge = work.flops / work.bytes, flops / gpu.memory_bytes_per_s
    return KernelRoofline(
        gpu=gpu.name,
        dtype=rate,
        flops=work.flops,
        bytes=work.bytes,
        arithmetic_intensity=intensity,
        flops_per_s=flops,
        bytes_per_s=gpu.memory_bytes_per_s,
        ridge=ridge,
        bound_by="compute" if intensity > ridge else "memory",
        sol_ms=_sol_ms(work, gpu, dtype),
    )


def _sol_ms(work: KernelWork, gpu: GpuSheet | None, dtype: str) -> float:
    if gpu is None:
        return 0.0
    flops = gpu.flops(_rate(dtype, work.matmul)) or gpu.flops("fp32") or math.inf
    return max(work.flops / flops, work.bytes / (gpu.memory_bytes_per_s or math.inf)) * 1e3


def _overlap(
    gpu: GpuSheet | None, work: KernelWork | None, copies: tuple[int, int], kernel_ms: float
) -> tuple[CopyOverlap, ...]:
    if gpu is None or work is None or pcie_bytes_per_s(gpu) is None:
        return ()
    made: Callable[[int], CopyOverlap] = lambda streams: simulate(  # noqa: E731
        gpu,
        host_to_device_bytes=copies[0],
        device_to_host_bytes=copies[1],
        kernel_ms=kernel_ms,
        streams=streams,
    )
    return tuple(made(streams) for streams in _STREAMS)


def _card(archs: Sequence[str]) -> GpuSheet | None:
    """A card of the last architecture that has a catalogued one.

    Those whose sheet has what limiter and streams need come first, then the fastest memory.
    """
    for arch in reversed(archs):
        capability = f"{arch[3:-1]}.{arch[-1]}"
        cards = [s for s in catalogue() if s.compute_capability == capability]
        known = [s for s in cards if s.memory_bytes_per_s]
        if known:
            return max(known, key=_figures)
    return None


def _figures(gpu: GpuSheet) -> tuple[bool, bool, float, str]:
    known = clock_hz(gpu) is not None, pcie_bytes_per_s(gpu) is not None
    return *known, gpu.memory_bytes_per_s or 0.0, gpu.name
