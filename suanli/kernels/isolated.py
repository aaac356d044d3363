"""Compiling and checking kernels in processes of their own, with a time limit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from suanli.base import codec
from suanli.base.errors import (
    BadInputError,
    MissingBackendError,
    SuanliError,
    TrialFailedError,
)
from suanli.base.lazy import present
from suanli.kernels.checking import BF16, CaseCheck
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.declaration import Config, Declaration, Sizes
from suanli.kernels.launching import INSTALL
from suanli.measure.isolation import Worker

_TARGET = "suanli.kernels._worker:KernelWorker"
_START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """What to compile: a kernel at a shape for an architecture."""

    sizes: Sizes
    dtype: str
    arch: str
    config: Config | None = None


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """What came of it: the compiled functions, or one line on why not."""

    request: CompileRequest
    functions: tuple[CompiledKernel, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check through the interpreter."""

    sizes: Sizes
    dtype: str
    config: Config | None = None
    seed: int = 0


def _need_triton() -> None:
    if not present("triton"):
        raise MissingBackendError("triton", INSTALL)


def compile_isolated(
    ref: str,
    requests: Iterable[CompileRequest],
    *,
    timeout_s: float = 60.0,
    keep: Path | None = None,
) -> list[CompileResult]:
    """Compile one kernel for several shapes, configurations or architectures.

    One process does them in turn; where one hangs or crashes, it is killed with all that it
    started, and a fresh one goes on with the next.

    Args:
        ref: A kernel that ships, or "file.py:name".
        requests: What to compile.
        timeout_s: Limit of one request.
        keep: Folder for the cubins.

    Raises:
        MissingBackendError: Triton is absent.
        BadInputError: There is no such kernel, architecture or dtype.
    """
    with Compilation(ref, timeout_s=timeout_s, keep=keep) as compilation:
        return [compilation.compile(request) for request in requests]


class Compilation:
    """A compiling process that goes on from request to request.

    Args:
        ref: A kernel that ships, or "file.py:name".
        timeout_s: Limit of one request.
        keep: Folder for the cubins.

    Raises:
        MissingBackendError: Triton is absent.
    """

    def __init__(self, ref: str, *, timeout_s: float = 60.0, keep: Path | None = None) -> None:
        _need_triton()
        self._timeout_s, self._keep = timeout_s, keep
        env = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
        self._pool = _OneWorker(ref, env)

    def compile(self, request: CompileRequest) -> CompileResult:
        """Compile one request; a failure of the compiler is a reason, not an exception.

        Raises:
            BadInputError: There is no such kernel, architecture or dtype.
        """
        arguments = {
            "sizes": dict(request.sizes),
            "dtype": request.dtype,
            "config": None if request.config is None else dict(request.config),
            "arch": request.arch,
            "keep": str(self._keep) if self._keep else "",
        }
        try:
            made = self._pool.call("compile", self._timeout_s, arguments)
        except (BadInputError, MissingBackendError):
            raise
        except TrialFailedError as failure:
            long = f"compiling for {request.arch} took too long and was ended: {failure}"
            reason = long if failure.kind == "timeout" else str(failure)
            return CompileResult(request=request, reason=reason)
        except SuanliError as failure:
            return CompileResult(request=request, reason=str(failure))
        functions = tuple(codec.from_json(CompiledKernel, item) for item in made)
        return CompileResult(request=request, functions=functions)

    def close(self) -> None:
        """End the process."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_isolated(
    ref: str,
    kernel: Declaration,
    requests: Sequence[CheckRequest],
    *,
    timeout_s: float = 120.0,
) -> list[CaseCheck]:
    """Check one kernel through Triton's interpreter on the CPU.

    Args:
        ref: A kernel that ships, or "file.py:name".
        kernel: The same, for the default configuration of what fails.
        requests: Shapes and dtypes; bf16 is refused, because the interpreter gets it wrong.
        timeout_s: Limit of one request.

    Raises:
        MissingBackendError: Triton is absent.
        BadInputError: There is no such kernel or dtype.
    """
    _need_triton()
    cases = []
    with _OneWorker(ref, {"TRITON_INTERPRET": "1"}) as pool:
        for request in requests:
            arguments = {
                "sizes": dict(request.sizes),
                "dtype": request.dtype,
                "config": None if request.config is None else dict(request.config),
                "seed": request.seed,
            }
            if request.dtype == "bf16":
                cases.append(_failed(kernel, request, "refused", BF16))
                continue
            try:
                made = pool.call("check", timeout_s, arguments)
                cases.append(codec.from_json(CaseCheck, made))
            except TrialFailedError as failure:
                cases.append(_failed(kernel, request, "failed", str(failure)))
    return cases


def check_kernel(ref: str, kernel: Declaration, *, seed: int = 0) -> list[CaseCheck]:
    """Check a kernel at all its shapes in fp32 and fp16, as far as it takes them."""
    requests = [
        CheckRequest(sizes=sizes, dtype=dtype, seed=seed + index)
        for index, sizes in enumerate(kernel.check_sizes)
        for dtype in kernel.dtypes
        if dtype != "bf16"
    ]
    return check_isolated(ref, kernel, requests)


def _failed(kernel: Declaration, request: CheckRequest, status: str, reason: str) -> CaseCheck:
    return CaseCheck(
        kernel=kernel.name,
        sizes=dict(request.sizes),
        dtype=request.dtype,
        config=dict(request.config or kernel.default_for(request.sizes, request.dtype)),
        status=status,
        where="interpreter on CPU",
        reason=reason,
    )


class _OneWorker:
    """A worker that is started on use, and anew after it had to be killed."""

    def __init__(self, ref: str, env: dict[str, str]) -> None:
        self._ref, self._env = ref, env
        self._worker: Worker | None = None

    def call(self, method: str, timeout_s: float, arguments: dict[str, Any]) -> Any:
        if self._worker is None or not self._worker.alive:
            self.close()
            self._worker = Worker(
                _TARGET, {"ref": self._ref}, env=self._env, start_timeout_s=_START_S
            )
        return self._worker.call(method, timeout_s=timeout_s, **arguments)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "_OneWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
