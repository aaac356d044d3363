"""Launches CUDA kernels on a GPU through the driver's own library, on torch's current stream."""

import ctypes
import ctypes.util
from functools import cache
from typing import Any

import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.kernels.cuda.compile import compile_cuda
from suanli.kernels.declaration import Config
from suanli.kernels.spec import CudaKernel, scalar

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of cuda.h
_FREE_SHARED = 48 * 1024  # more per block must be asked for (programming guide, 16.4.3)
_COMPILE_S = 60.0


class Driver:
    """The CUDA driver. Modules are loaded once for each kernel, configuration and device.

    Args:
        library: `libcuda`, or a stand-in with the same functions.
    """

    def __init__(self, library: Any) -> None:
        self._cuda = library
        self._functions: dict[tuple[str, ...], ctypes.c_void_p] = {}

    @staticmethod
    @cache
    def here() -> "Driver":
        """This machine's driver.

        Raises:
            SuanliError: There is none.
        """
        try:
            return Driver(ctypes.CDLL("libcuda.so.1"))
        except OSError:
            raise SuanliError("no CUDA driver here", next_step="suanli doctor") from None

    def launch(
        self,
        kernel: CudaKernel,
        values: dict[str, Any],
        config: Config,
        dtype: str,
        device: torch.device,
    ) -> None:
        """Compile where needed, and launch; nothing is waited for.

        Args:
            kernel: What to launch.
            values: Tensors and numbers by name, with the sizes under "sizes".
            config: The configuration.
            dtype: Of the main input.
            device: Where the tensors live.

        Raises:
            BadInputError: The kernel does not compile, or the launch is over a limit.
            SuanliError: The driver refuses; its own words are given.
        """
        sizes = values["sizes"]
        plan = kernel.launch_at(sizes, config)
        function = self._function(kernel, sizes, config, dtype, device)
        if plan.shared_bytes > _FREE_SHARED:
            attribute = ctypes.c_int(_MAX_DYNAMIC_SHARED)
            self._check(
                self._cuda.cuFuncSetAttribute(function, attribute, ctypes.c_int(plan.shared_bytes)),
                f"{plan.shared_bytes} bytes of shared memory",
            )
        slots = [_slot(values[n] if n in values else sizes[n]) for n in kernel.arguments]
        pointers = (ctypes.c_void_p * max(1, len(slots)))(
            *(ctypes.cast(ctypes.pointer(slot), ctypes.c_void_p) for slot in slots)
        )
        extents = map(ctypes.c_uint, (*plan.grid, *plan.block, plan.shared_bytes))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        with torch.cuda.device(device):
            code = self._cuda.cuLaunchKernel(function, *extents, stream, pointers, None)
        self._check(code, f"launching {kernel.function}")

    def _function(
        self,
        kernel: CudaKernel,
        sizes: dict[str, int],
        config: Config,
        dtype: str,
        device: torch.device,
    ) -> ctypes.c_void_p:
        macros = kernel.macros(sizes, config, dtype)
        key = (kernel.source_hash, str(sorted(macros.items())), str(device))
        if key in self._functions:
            return self._functions[key]
        major, minor = torch.cuda.get_device_capability(device)
        made = compile_cuda(
            kernel,
            f"sm_{major}{minor}",
            sizes=sizes,
            config=config,
            dtype=dtype,
            timeout_s=_COMPILE_S,
        )
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream(device)  # makes the context that the module is loaded into
            code = self._cuda.cuModuleLoadData(ctypes.byref(module), made.code)
            self._check(code, f"loading {kernel.function}")
            name = kernel.function.encode()
            code = self._cuda.cuModuleGetFunction(ctypes.byref(function), module, name)
            self._check(code, f"finding {kernel.function}")
        self._functions[key] = function
        return function

    def _check(self, code: int, doing: str) -> None:
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        words = (text.value or b"").decode("utf-8", "replace") or f"error {code}"
        if code in (1, 701):  # invalid value, too many resources for the launch
            raise BadInputError(f"{doing}: {words}")
        raise SuanliError(f"{doing}: {words}")


def _slot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return scalar(value)
