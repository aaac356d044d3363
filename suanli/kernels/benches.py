"""Where configurations of a Triton kernel are tried: this GPU, or the compiler alone."""

import math
from collections.abc import Sequence
from typing import Any, Self

from suanli.base import codec
from suanli.base.errors import (
    BadInputError,
    MissingBackendError,
    SuanliError,
    TrialFailedError,
)
from suanli.base.gpu_sheet import GpuSheet, Source
from suanli.base.lazy import present
from suanli.base.timing import Estimate
from suanli.devices import device as open_device
from suanli.devices import device_names, find_sheet, gpu_infos, sheet_for
from suanli.kernels.declaration import Declaration, Sizes
from suanli.kernels.gpu_check import end_unless_healthy
from suanli.kernels.isolated import CheckRequest, Compilation, CompileRequest, check_isolated
from suanli.kernels.launching import INSTALL
from suanli.kernels.static_model import forecast
from suanli.kernels.tuning import Config, RaceFigures, Static
from suanli.measure.isolation import Worker

_ITEM = {"fp32": 4, "fp16": 2, "bf16": 2}
_START_S = 180.0


class StaticBench:
    """Compiles for a card that need not be here, judges by the static model, times nothing.

    Args:
        ref: A kernel that ships, or "file.py:name".
        kernel: The same.
        sizes: The shape.
        dtype: Of the main input.
        gpu: The card that it is judged for.
        timeout_s: Limit of one compilation; twice as much of one check in the interpreter.
    """

    can_time = False
    fingerprint = ""  # of a device that runs it

    def __init__(
        self,
        ref: str,
        kernel: Declaration,
        sizes: Sizes,
        dtype: str,
        gpu: GpuSheet,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        if not present("triton"):
            raise MissingBackendError("triton", INSTALL)
        self._ref, self._kernel, self._gpu = ref, kernel, gpu
        self._sizes, self._dtype, self._timeout_s = sizes, dtype, timeout_s
        self._arch = f"sm_{gpu.compute_capability.replace('.', '')}"
        self._compilation = Compilation(ref, timeout_s=timeout_s)
        self.where = f"compiled for {gpu.name} ({self._arch}), not run"

    def compile(self, config: Config) -> Static:
        """Compile and judge; a configuration that spills is kept, and ranked low."""
        request = CompileRequest(
            sizes=self._sizes, dtype=self._dtype, arch=self._arch, config=config
        )
        made = self._compilation.compile(request)
        if made.reason:
            return Static(reason=made.reason, predicted_ms=math.inf)
        item = _ITEM[self._dtype]
        traffic = self._kernel.traffic
        judged = forecast(
            made.functions,
            self._kernel.work(self._sizes, item),
            gpu=self._gpu,
            dtype=self._dtype,
            traffic=traffic(config, self._sizes, item) if traffic else None,
        )
        return Static(
            functions=made.functions,
            predicted_ms=judged.predicted_ms,
            occupancy=judged.occupancy,
            limited_by=judged.limited_by,
            reason=judged.reason,
        )

    def verify(self, config: Config) -> str:
        """Through the interpreter at the check shapes, in fp16 or fp32."""
        dtype = "fp16" if self._dtype == "bf16" else self._dtype
        if dtype not in self._kernel.dtypes:
            return "the interpreter cannot judge bf16"
        requests = [
            CheckRequest(sizes=sizes, dtype=dtype, config=config)
            for sizes in self._kernel.check_sizes
        ]
        cases = check_isolated(self._ref, self._kernel, requests, timeout_s=2 * self._timeout_s)
        return next((case.reason for case in cases if case.status != "verified"), "")

    def time(self, config: Config) -> Estimate:
        """Never called: `can_time` is False."""
        raise TrialFailedError("there is no GPU here", kind="error")

    def rivals(self) -> Sequence[str]:
        """None."""
        return ()

    def race(self, config: Config, rival: str) -> RaceFigures:
        """Never called: there are no rivals."""
        raise TrialFailedError("there is no GPU here", kind="error")

    def close(self) -> None:
        """End the compiling process."""
        self._compilation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GpuBench(StaticBench):
    """Compiles and judges as `StaticBench`, and verifies, times and races on a GPU of this machine.

    Args:
        ref: A kernel that ships, or "file.py:name".
        kernel: The same.
        sizes: The shape.
        dtype: Of the main input.
        gpu: The card's sheet.
        device: Such as "cuda:0".
        timeout_s: Limit of one compilation; a timing gets twice, a check five times and a race
            ten times as much.
    """

    can_time = True

    def __init__(
        self,
        ref: str,
        kernel: Declaration,
        sizes: Sizes,
        dtype: str,
        gpu: GpuSheet,
        *,
        device: str,
        timeout_s: float = 60.0,
    ) -> None:
        super().__init__(ref, kernel, sizes, dtype, gpu, timeout_s=timeout_s)
        self._setup = {"ref": ref, "sizes": dict(sizes), "dtype": dtype, "device": device}
        self._worker: Worker | None = None
        self.where = f"{gpu.name} ({device})"
        self.fingerprint = open_device(device).info.fingerprint

    def verify(self, config: Config) -> str:
        """On the GPU, at the check shapes and the timed one."""
        try:
            return str(self._call("verify", 5 * self._timeout_s, config=dict(config)))
        except SuanliError as failure:
            return str(failure)

    def time(self, config: Config) -> Estimate:
        """Cold device time."""
        return codec.from_json(
            Estimate, self._call("time", 2 * self._timeout_s, config=dict(config))
        )

    def rivals(self) -> Sequence[str]:
        """Eager, torch.compile, and the kernel's libraries; absent ones fail with a reason."""
        return ("eager", "torch.compile", *(self._kernel.libraries or {}))

    def race(self, config: Config, rival: str) -> RaceFigures:
        """In alternation in the worker."""
        made = self._call("race", 10 * self._timeout_s, config=dict(config), rival=rival)
        return codec.from_json(RaceFigures, made)

    def close(self) -> None:
        """End both processes."""
        super().close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _call(self, method: str, timeout_s: float, **arguments: Any) -> Any:
        if self._worker is None or not self._worker.alive:
            if self._worker is not None:
                self._worker.close()
            self._worker = Worker(
                "suanli.kernels._gpu_worker:GpuWorker",
                self._setup,
                env={"TRITON_INTERPRET": "0"},
                start_timeout_s=_START_S,
            )
        try:
            return self._worker.call(method, timeout_s=timeout_s, **arguments)
        except SuanliError:
            end_unless_healthy(self._worker)
            raise


def open_bench(
    ref: str,
    kernel: Declaration,
    sizes: Sizes,
    dtype: str,
    *,
    gpu: str | None = None,
    timeout_s: float = 60.0,
) -> StaticBench:
    """The bench for this machine: its GPU where there is one, else the compiler alone.

    Args:
        ref: A kernel that ships, or "file.py:name".
        kernel: The same.
        sizes: The shape.
        dtype: Of the main input.
        gpu: A card of the catalogue to judge for, such as "H200"; only without a GPU of one's own,
            or to rank for another card than that.
        timeout_s: Limit of one compilation.

    Raises:
        BadInputError: The card is unknown, or none was named and there is no GPU here.
        MissingBackendError: Triton is absent.
    """
    if gpu is None:
        cards = [name for name in device_names() if name.startswith("cuda")]
        if not cards:
            raise BadInputError(
                "there is no GPU here",
                next_step="name a card to rank for, such as --gpu h200-sxm-141gb",
            )
        return GpuBench(
            ref, kernel, sizes, dtype, own_sheet(), device=cards[0], timeout_s=timeout_s
        )
    return StaticBench(ref, kernel, sizes, dtype, find_sheet(gpu), timeout_s=timeout_s)


def own_sheet() -> GpuSheet:
    """The sheet of the first GPU here; where it is not catalogued, what the driver says of it."""
    info = gpu_infos()[0]
    known = sheet_for(info.name)
    if known is not None:
        return known
    return GpuSheet(
        name=info.name,
        nvml_names=(info.name,),
        architecture="unknown",
        compute_capability=info.compute_capability or "8.0",
        memory_gb=info.memory_bytes / 1e9,
        sources=(Source(document="the driver", figures=("memory_gb", "multiprocessors")),),
        multiprocessors=info.multiprocessors,
    )
