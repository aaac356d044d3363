"""Where configurations of a CUDA kernel are tried: the same search as for Triton."""

import math
from collections.abc import Sequence
from typing import Self

from suanli.base.errors import BadInputError, SuanliError, TrialFailedError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.timing import Estimate
from suanli.kernels.benches import GpuBench
from suanli.kernels.cuda.checking import check_config
from suanli.kernels.cuda.compile import compile_cuda
from suanli.kernels.cuda.declared import declaration
from suanli.kernels.declaration import Sizes
from suanli.kernels.dtypes import item_bytes
from suanli.kernels.spec import CudaKernel
from suanli.kernels.static_model import forecast
from suanli.kernels.tuning import Config, RaceFigures, Static


def judged(
    kernel: CudaKernel, sizes: Sizes, dtype: str, gpu: GpuSheet, config: Config, timeout_s: float
) -> Static:
    """Compile one configuration for a card and judge it by the static model.

    Args:
        kernel: What to compile.
        sizes: The shape.
        dtype: Of the main input.
        gpu: The card.
        config: The configuration.
        timeout_s: Limit of the compiler.

    Raises:
        MissingBackendError: No compiler is installed.
    """
    arch = f"sm_{gpu.compute_capability.replace('.', '')}"
    try:
        made = compile_cuda(
            kernel, arch, sizes=sizes, config=config, dtype=dtype, timeout_s=timeout_s
        )
    except BadInputError as wrong:
        return Static(reason=str(wrong), predicted_ms=math.inf)
    work = declaration(kernel).work(sizes, item_bytes(dtype))
    found = forecast((made.record,), work, gpu=gpu, dtype=dtype)
    return Static(
        functions=(made.record,),
        predicted_ms=found.predicted_ms,
        occupancy=found.occupancy,
        limited_by=found.limited_by,
        reason=found.reason,
    )


class CudaStaticBench:
    """Compiles for a card that need not be here and verifies on the CPU; times nothing.

    Args:
        kernel: What is tuned.
        sizes: The shape.
        dtype: Of the main input.
        gpu: The card that it is judged for.
        timeout_s: Limit of one compilation, and of one launch on the CPU.
    """

    can_time = False
    fingerprint = ""  # of a device that runs it

    def __init__(
        self,
        kernel: CudaKernel,
        sizes: Sizes,
        dtype: str,
        gpu: GpuSheet,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        self._kernel, self._sizes, self._dtype, self._gpu = kernel, sizes, dtype, gpu
        self._timeout_s = timeout_s
        arch = f"sm_{gpu.compute_capability.replace('.', '')}"
        self.where = f"compiled for {gpu.name} ({arch}), not run"

    def compile(self, config: Config) -> Static:
        """Compile and judge."""
        return judged(self._kernel, self._sizes, self._dtype, self._gpu, config, self._timeout_s)

    def verify(self, config: Config) -> str:
        """By execution on the CPU at the check shapes."""
        try:
            cases = check_config(self._kernel, config, self._dtype, timeout_s=self._timeout_s)
        except SuanliError as failure:
            return str(failure)
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
        """Nothing to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CudaGpuBench(GpuBench):
    """Verifies, times and races on a GPU of this machine, as for Triton; compiles with nvcc.

    Args:
        ref: "file.py:name".
        kernel: The same.
        sizes: The shape.
        dtype: Of the main input.
        gpu: The card's sheet.
        device: Such as "cuda:0".
        timeout_s: Limit of one compilation, as for `GpuBench`.
    """

    def __init__(
        self,
        ref: str,
        kernel: CudaKernel,
        sizes: Sizes,
        dtype: str,
        gpu: GpuSheet,
        *,
        device: str,
        timeout_s: float = 60.0,
    ) -> None:
        stated = declaration(kernel)
        super().__init__(ref, stated, sizes, dtype, gpu, device=device, timeout_s=timeout_s)
        self._cuda = kernel

    def compile(self, config: Config) -> Static:
        """Compile and judge."""
        return judged(self._cuda, self._sizes, self._dtype, self._gpu, config, self._timeout_s)
