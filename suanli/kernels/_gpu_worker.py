"""What runs on the GPU, in a process of its own: a kernel that faults takes its context with it."""

from collections.abc import Callable
from typing import Any

import torch

from suanli.base import codec
from suanli.base.errors import BadInputError, SuanliError
from suanli.devices import device as open_device
from suanli.kernels.checking import check_here
from suanli.kernels.cold_timing import ColdTimer
from suanli.kernels.declaration import DTYPES, Config, Inputs
from suanli.kernels.subjects import find_kernel

_FLUSH_BYTES = 512 * 2**20
_YARDSTICK_SIDE = 4096


class GpuWorker:
    """One kernel at one shape on one GPU.

    Args:
        ref: A kernel that ships, or "file.py:name".
        sizes: The shape that is timed.
        dtype: Such as "bf16".
        device: Such as "cuda:0".
    """

    def __init__(self, ref: str, sizes: dict[str, int], dtype: str, device: str) -> None:
        self._kernel = find_kernel(ref)
        self._sizes, self._dtype, self._device = sizes, dtype, device
        self._opened = open_device(device)
        self._inputs: Inputs | None = None
        self._timer: ColdTimer | None = None

    def verify(self, config: dict[str, int]) -> str:
        """Why the configuration is wrong at a check shape or the timed shape, or "".

        Raises:
            SuanliError: It cannot be run.
        """
        for sizes in (*self._kernel.check_sizes, self._sizes):
            if sizes is self._sizes and not self._fits():
                continue
            case = check_here(self._kernel, sizes, self._dtype, config=config, device=self._device)
            if case.status == "failed":
                raise SuanliError(f"{case.reason} (at {dict(sizes)})")
            if case.status != "verified":
                return f"{case.reason} (at {dict(sizes)})"
        return ""

    def healthy(self) -> bool:
        """Whether the GPU still takes work from this process; after a fault it never does."""
        try:
            torch.zeros(1, device=self._device).sum().item()
        except RuntimeError:
            return False
        return True

    def check(self, sizes: dict[str, int], dtype: str, seed: int) -> Any:
        """One case with the default configuration, as JSON."""
        made = check_here(self._kernel, sizes, dtype, device=self._device, seed=seed)
        return codec.to_json(made)

    def time(self, config: dict[str, int]) -> Any:
        """Cold milliseconds per call, as JSON."""
        estimate, steady = self._ready().measure(self._call(config))
        if not steady:
            raise SuanliError("the GPU's clock drifted by more than 3 % in three measurements")
        return codec.to_json(estimate)

    def race(self, config: dict[str, int], rival: str) -> Any:
        """The rival and the configuration in alternation, as JSON."""
        done = self._ready().race(self._rival(rival), self._call(config))
        figures = {"rival_ms": done.a_ms, "winner_ms": done.b_ms, "speedup": done.ratio}
        return codec.to_json(figures)

    def rivals(self) -> list[str]:
        """Names that `race` takes."""
        return ["eager", "torch.compile", *(self._kernel.libraries or {})]

    def _fits(self) -> bool:
        """Whether the fp64 reference of the timed shape has room: some 16 times the inputs."""
        free, _ = torch.cuda.mem_get_info(self._device)
        work = self._kernel.work(self._sizes, 8)
        return 16 * work.bytes < free and work.flops < 1e13

    def _given(self) -> Inputs:
        if self._inputs is None:
            self._inputs = self._kernel.inputs(self._sizes, DTYPES[self._dtype], self._device, 0)
        return self._inputs

    def _call(self, config: Config) -> Callable[[], object]:
        inputs = self._given()
        return lambda: self._kernel.run(inputs, config)

    def _rival(self, name: str) -> Callable[[], object]:
        inputs = self._given()
        eager = self._kernel.eager or self._kernel.reference
        if name == "eager":
            return lambda: eager(inputs)
        if name == "torch.compile":
            compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
            return lambda: compiled(inputs)
        if name not in (self._kernel.libraries or {}):
            raise BadInputError(f"{self._kernel.name} has no rival {name!r}")
        library = (self._kernel.libraries or {})[name]
        return lambda: library(inputs)

    def _ready(self) -> ColdTimer:
        """The timer, with its flush and yardstick on the device."""
        if self._timer is None:
            waste = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self._device)
            side = torch.randn(
                _YARDSTICK_SIDE, _YARDSTICK_SIDE, device=self._device, dtype=torch.float16
            )
            self._timer = ColdTimer(
                device=self._opened, flush=waste.zero_, yardstick=lambda: side @ side
            )
        return self._timer
