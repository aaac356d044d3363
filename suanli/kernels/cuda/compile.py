"""CUDA C++ to machine code for any architecture, with no GPU here and under a time limit."""

import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.base.compiler import run_limited
from suanli.base.errors import BadInputError, MissingBackendError, SuanliError
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda import toolkit
from suanli.kernels.declaration import Config, Sizes
from suanli.kernels.spec import CudaKernel

# What NVCC 13 and NVRTC 12.9 know together.
ARCHITECTURES = (
    *("sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_87", "sm_89"),
    *("sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
)
_CHILD = Path(__file__).with_name("nvrtc_child.py")
_RTC_HEADERS = Path(__file__).with_name("rtc")
_HEADERS = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}
_ERROR = re.compile(
    r"^(?P<file>[^\s(][^(]*)\((?P<line>\d+)\): (?:catastrophic |fatal )?error(?: #[\w-]+)?: "
    r"(?P<text>.*)$"
)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, kw_only=True)
class CudaCode:
    """A kernel's machine code and what the compiler said of it."""

    record: CompiledKernel
    code: bytes


class _UnknownArchitectureError(Exception):
    """This compiler does not know the architecture; another one may."""


def compile_cuda(
    kernel: CudaKernel,
    arch: str,
    *,
    sizes: Sizes,
    config: Config,
    dtype: str,
    timeout_s: float = 60.0,
) -> CudaCode:
    """Compile a kernel for one architecture by nvcc, or by NVRTC where nvcc is absent or too new.

    Args:
        kernel: What to compile.
        arch: Such as "sm_90".
        sizes: Shape, for macros and the launch.
        config: The configuration.
        dtype: Of the main input.
        timeout_s: Limit of the whole; then the compiler and all that it started is killed.

    Raises:
        BadInputError: The architecture is unknown, the kernel does not compile (its own line is
            named), the launch is over a limit, or the compiler takes too long.
        MissingBackendError: No compiler for this architecture is installed.
    """
    check_arch(arch)
    launch = kernel.launch_at(sizes, config)
    libraries = toolkit.nvrtc_libraries()
    text = _text(kernel, kernel.macros(sizes, config, dtype))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="suanli-nvcc-") as name:
        folder = Path(name)
        (folder / "kernel.cu").write_text(text, encoding="utf-8")
        tried = [nvcc for nvcc in [toolkit.nvcc()] if nvcc is not None]
        for tool in (*tried, *libraries):
            run = _nvrtc if tool in libraries else _nvcc
            try:
                said, compiler = run(tool, folder, arch, kernel, timeout_s)
            except _UnknownArchitectureError:
                continue
            record = CompiledKernel(
                name=kernel.function,
                arch=arch,
                compiler=compiler,
                threads=launch.threads,
                blocks=launch.blocks,
                dynamic_shared_bytes=launch.shared_bytes,
                seconds=time.perf_counter() - begin,
                constants={k: str(v) for k, v in config.items()},
                registers=0,
            )
            code = (folder / "kernel.cubin").read_bytes()
            return CudaCode(record=usage(record, said), code=code)
    what = "nvcc or NVRTC" if not tried and not libraries else f"a CUDA compiler for {arch}"
    raise MissingBackendError(what, toolkit.INSTALL)


def check_arch(arch: str) -> None:
    """Raise BadInputError if an architecture is unknown."""
    if arch not in ARCHITECTURES:
        raise BadInputError(
            f"unknown architecture {arch!r}", next_step=f"one of {', '.join(ARCHITECTURES)}"
        )


def usage(record: CompiledKernel, said: str) -> CompiledKernel:
    """The record with what `ptxas -v` says of its function.

    Args:
        record: Names the function.
        said: All that the compiler printed.

    Raises:
        SuanliError: It says nothing of this function.
    """
    current = ""
    found: dict[str, int] = {}
    for line in said.splitlines():
        entry = _ENTRY.search(line) or _PROPERTIES.search(line)
        current = entry[1] if entry else current
        if current != record.name:
            continue
        stack, used, shared = _STACK.search(line), _USED.search(line), _SHARED.search(line)
        if stack:
            found |= {
                "stack_bytes": int(stack[1]),
                "spill_store_bytes": int(stack[2]),
                "spill_load_bytes": int(stack[3]),
            }
        if used:
            found["registers"] = int(used[1])
            found["static_shared_bytes"] = int(shared[1]) if shared else 0
    if "registers" not in found:
        raise SuanliError(
            f"the compiler says nothing of {record.name}",
            next_step=f'it should be extern "C" __global__ void {record.name}(...)',
        )
    return replace(record, **found)  # type: ignore[arg-type]


def _text(kernel: CudaKernel, macros: dict[str, str]) -> str:
    header = _HEADERS.get(macros["ELEMENT"])
    lines = [f"#include <{header}>"] if header else []
    lines += [f"#define {name} {value}" for name, value in macros.items()]
    lines.append(f'#line {kernel.first_line()} "{kernel.source_path().name}"')
    return "\n".join([*lines, kernel.text(), ""])


def _nvcc(
    tool: Path, folder: Path, arch: str, kernel: CudaKernel, timeout_s: float
) -> tuple[str, str]:
    out = folder / "kernel.cubin"
    command = [str(tool), "-cubin", f"-arch={arch}", "-std=c++17", "-Xptxas", "-v"]
    command += ["-I", str(kernel.source_path().resolve().parent), "-o", str(out)]
    code, said = run_limited([*command, str(folder / "kernel.cu")], timeout_s)
    if code not in (0, None) and (
        "Unsupported gpu arch" in said or "not defined for option" in said
    ):
        raise _UnknownArchitectureError
    _judge(code, said, kernel, arch, timeout_s)
    return said, _nvcc_version(tool)


def _nvrtc(
    library: Path, folder: Path, arch: str, kernel: CudaKernel, timeout_s: float
) -> tuple[str, str]:
    out = folder / "kernel.cubin"
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
    options.append("--pre-include=suanli_rtc.h")
    includes = (kernel.source_path().resolve().parent, _RTC_HEADERS, *toolkit.include_folders())
    options += [f"--include-path={path}" for path in includes]
    command = [sys.executable, "-S", "-E", str(_CHILD), str(library)]
    command += [str(folder / "kernel.cu"), str(out), *options]
    code, said = run_limited(command, timeout_s)
    if code == 4 and "gpu-architecture" in said:
        raise _UnknownArchitectureError
    _judge(code, said, kernel, arch, timeout_s)
    return said, toolkit.nvrtc_name(library)


def _judge(code: int | None, said: str, kernel: CudaKernel, arch: str, timeout_s: float) -> None:
    if code is None:
        raise BadInputError(
            f"{kernel.name}: compiling for {arch} took more than {timeout_s:g} s and was ended",
            next_step="unroll less, or give more time",
        )
    if code != 0:
        raise BadInputError(f"{_first_error(said, kernel)} (compiling for {arch})")


def _first_error(said: str, kernel: CudaKernel) -> str:
    name = kernel.source_path().name
    errors = [match for match in map(_ERROR.match, said.splitlines()) if match]
    own = [match for match in errors if Path(match["file"]).name == name]
    if errors:
        match = (own or errors)[0]
        return f"{Path(match['file']).name}:{match['line']}: {match['text']}"
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()]
    return f"{kernel.name}: {(lines or said.strip().splitlines() or ['the compiler failed'])[0]}"


def _nvcc_version(tool: Path) -> str:
    _, said = run_limited([str(tool), "--version"], 10.0)
    match = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvcc {match[1] if match else 'of unknown version'}"
