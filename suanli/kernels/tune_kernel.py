"""`tune` for Triton kernels, and the look-up that says whether a shipped kernel may be used."""

from collections.abc import Sequence

import torch

from suanli.base.events import Listener, ignore
from suanli.devices import device as open_device
from suanli.kernels.benches import StaticBench, open_bench
from suanli.kernels.configuration import Winner, compiler_version, find, store
from suanli.kernels.cuda import toolkit
from suanli.kernels.cuda.bench import CudaStaticBench
from suanli.kernels.declaration import Config, Declaration, Sizes
from suanli.kernels.search_log import SearchLog
from suanli.kernels.shipped import shipped_kernel
from suanli.kernels.subjects import find_kernel
from suanli.kernels.tuning import SearchLimits, TuneResult, configurations, tune


def tune_kernel(
    ref: str,
    sizes: Sizes | None = None,
    dtype: str | None = None,
    *,
    gpu: str | None = None,
    limits: SearchLimits | None = None,
    fresh: bool = False,
    listener: Listener = ignore,
) -> TuneResult:
    """Find the fastest right configuration of a Triton kernel, and keep it.

    On a GPU of this machine configurations are timed, verified and raced; a winner is kept for
    later processes under the kernel's source, the shape, the device and Triton's version. With
    `gpu` naming a card of the catalogue they are only ranked, and nothing is kept.

    Args:
        ref: A kernel that ships, or "file.py:name".
        sizes: The shape; the kernel's first bench shape where None.
        dtype: Of the main input; bf16 where None and the kernel takes it, else its first.
        gpu: A card to rank for, such as "H200"; None is this machine's GPU.
        limits: Of configurations and time.
        fresh: Whether trials of a run that was cut short are forgotten; else it goes on with them.
        listener: Told of progress.

    Raises:
        BadInputError: There is no such kernel or card, or no GPU here and none was named.
        MissingBackendError: Triton is absent.
    """
    kernel = find_kernel(ref)
    shape = dict(sizes or kernel.bench_sizes[0])
    chosen = dtype or ("bf16" if "bf16" in kernel.dtypes else kernel.dtypes[0])
    first = kernel.default_for(shape, chosen)
    candidates = configurations(kernel.tunables, lambda config: kernel.legal(config, shape), first)
    limits = limits or SearchLimits()
    limits.check()
    with open_bench(ref, kernel, shape, chosen, gpu=gpu, timeout_s=limits.timeout_s) as bench:
        return search(
            kernel, shape, chosen, candidates, bench, limits=limits, fresh=fresh, listener=listener
        )


def search(
    kernel: Declaration,
    sizes: Sizes,
    dtype: str,
    candidates: Sequence[Config],
    bench: StaticBench | CudaStaticBench,
    *,
    limits: SearchLimits,
    fresh: bool,
    listener: Listener,
) -> TuneResult:
    """`tune` with a log of its trials on disk, and its timed winner kept.

    Args:
        kernel: What is tuned.
        sizes: The shape.
        dtype: Of the main input.
        candidates: Configurations, the default one first.
        bench: Where they are tried.
        limits: Of configurations and time.
        fresh: Whether to forget what a run that was cut short found.
        listener: Told of progress.
    """
    facts = {
        "source": kernel.source_hash,
        "sizes": dict(sorted(sizes.items())),
        "dtype": dtype,
        "where": bench.where,
        "device": bench.fingerprint,
        "compiler": [compiler_version(), *toolkit.compilers()],
    }
    log = SearchLog(kernel.name, facts)
    if fresh:
        log.done()
    found = tune(
        kernel.name, sizes, dtype, candidates, bench, limits=limits, log=log, listener=listener
    )
    if bench.can_time and found.config is not None:
        store(kernel, winner_of(kernel, found, bench.fingerprint))
    return found


def winner_of(kernel: Declaration, result: TuneResult, device: str) -> Winner:
    """What is kept of a search.

    Args:
        kernel: What was tuned.
        result: The search, with a winner.
        device: The device's fingerprint.

    Raises:
        ValueError: The search has no winner.
    """
    if result.config is None:
        raise ValueError("the search has no winner")
    return Winner(
        kernel=kernel.name,
        source_hash=kernel.source_hash,
        sizes=result.sizes,
        dtype=result.dtype,
        device=device,
        compiler=compiler_version(),
        config=result.config,
        step_ms=result.step_ms.p50 if result.step_ms else None,
        rivals_ms={name: race.rival_ms.p50 for name, race in result.races.items()},
        speedup_lo95=result.speedup_lo95,
        verified=result.verified,
        ranked=result.ranking,
    )


def faster_kernel(name: str, sizes: Sizes, dtype: str, torch_device: str) -> Winner | None:
    """The winner of a shipped kernel where it was verified and measured faster, else None.

    For whoever would use a shipped kernel in place of what PyTorch does: only a race on this very
    device, with the same source, shape, dtype and compiler, says yes.

    Args:
        name: A kernel that ships.
        sizes: The shape.
        dtype: Of the main input.
        torch_device: Such as "cuda:0"; on "cpu" the answer is always None.

    Raises:
        BadInputError: No such kernel ships, or there is no such device.
    """
    kernel = shipped_kernel(name)
    if torch.device(torch_device).type != "cuda":
        return None
    winner = find(kernel, sizes, dtype, open_device(torch_device).info.fingerprint)
    return winner if winner is not None and winner.faster else None
