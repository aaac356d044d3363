"""Checks a kernel on a GPU of this machine, in a process of its own."""

from dataclasses import asdict

from suanli.base import codec
from suanli.base.errors import SuanliError, TrialFailedError
from suanli.base.events import Event, Listener, ignore
from suanli.base.kernel_results import KernelCase
from suanli.kernels.checking import CaseCheck
from suanli.kernels.declaration import Declaration, Sizes
from suanli.measure.isolation import Worker

_WORKER = "suanli.kernels._gpu_worker:GpuWorker"
_START_S = 180.0
_CASE_S = 300.0
_HEALTH_S = 30.0


def check_on_gpu(
    ref: str, kernel: Declaration, device: str, *, seed: int = 0, listener: Listener = ignore
) -> list[KernelCase]:
    """Run a kernel at all its shapes and dtypes on guarded memory and judge what it gives.

    A kernel that faults takes its process with it; the next case gets a fresh one.

    Args:
        ref: A kernel that ships, or "file.py:name".
        kernel: The same.
        device: Such as "cuda:0".
        seed: Of the inputs.
        listener: Told of progress.
    """
    cases = []
    worker: Worker | None = None
    try:
        for index, sizes in enumerate(kernel.check_sizes):
            for dtype in kernel.dtypes:
                listener(Event(kind="step", text=f"checking {kernel.name} in {dtype} on {device}"))
                try:
                    if worker is None or not worker.alive:
                        worker = _started(ref, kernel, device, worker)
                    made = worker.call(
                        "check",
                        timeout_s=_CASE_S,
                        sizes=dict(sizes),
                        dtype=dtype,
                        seed=seed + index,
                    )
                    cases.append(as_case(codec.from_json(CaseCheck, made)))
                    if cases[-1].status == "failed":
                        end_unless_healthy(worker)
                except TrialFailedError as failure:
                    cases.append(_failed(kernel, sizes, dtype, device, str(failure)))
    finally:
        if worker is not None:
            worker.close()
    return cases


def end_unless_healthy(worker: Worker) -> None:
    """End a worker whose GPU context a fault has broken, so that the next call gets a fresh one."""
    try:
        healthy = worker.alive and bool(worker.call("healthy", timeout_s=_HEALTH_S))
    except SuanliError:
        healthy = False
    if not healthy:
        worker.close()


def as_case(made: CaseCheck) -> KernelCase:
    """A case as the record that the verb gives."""
    kept = {
        key: value for key, value in asdict(made).items() if key in KernelCase.__dataclass_fields__
    }
    return KernelCase(**kept)


def _started(ref: str, kernel: Declaration, device: str, old: Worker | None) -> Worker:
    if old is not None:
        old.close()
    setup = {
        "ref": ref,
        "sizes": dict(kernel.check_sizes[0]),
        "dtype": kernel.dtypes[0],
        "device": device,
    }
    return Worker(_WORKER, setup, env={"TRITON_INTERPRET": "0"}, start_timeout_s=_START_S)


def _failed(kernel: Declaration, sizes: Sizes, dtype: str, device: str, reason: str) -> KernelCase:
    return KernelCase(
        sizes=dict(sizes),
        dtype=dtype,
        config=dict(kernel.default_for(sizes, dtype)),
        where=device,
        status="failed",
        reason=reason,
    )
