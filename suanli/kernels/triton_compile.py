"""Triton functions to machine code for any architecture, with no GPU here."""

import contextlib
import io
import math
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.lazy import need, version
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.declaration import DTYPES, Config, Declaration, Sizes
from suanli.kernels.launching import INSTALL, Launch, recording

ARCHITECTURES = (
    *("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90"),
    *("sm_100", "sm_103", "sm_110", "sm_120", "sm_121"),
)
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
# Triton's runtime tells the compiler of arguments that are multiples of this.
_ALIGNED = 16


def compile_here(
    kernel: Declaration,
    sizes: Sizes,
    dtype: str,
    arch: str,
    *,
    config: Config | None = None,
    keep: Path | None = None,
) -> list[CompiledKernel]:
    """Compile every function that one call of a kernel launches, in this process.

    Compilers can hang; `compile_isolated` puts a limit on them.

    Args:
        kernel: What to compile.
        sizes: Shape of the call: divisibility of sizes changes the code.
        dtype: Such as "bf16".
        arch: Such as "sm_90".
        config: The configuration; the default one where None.
        keep: Folder for the cubins.

    Raises:
        BadInputError: The architecture or dtype is unknown.
        MissingBackendError: Triton is absent.
        SuanliError: It does not compile; the first line of the compiler's complaint is given.
    """
    need("triton", INSTALL)
    if arch not in ARCHITECTURES:
        raise BadInputError(
            f"unknown architecture {arch!r}", next_step=f"one of {', '.join(ARCHITECTURES)}"
        )
    if dtype not in kernel.dtypes or dtype not in DTYPES:
        raise BadInputError(
            f"{kernel.name} does not take {dtype}", next_step=f"it takes {', '.join(kernel.dtypes)}"
        )
    chosen = config or kernel.default_for(sizes, dtype)
    with recording() as launches:
        kernel.run(kernel.inputs(sizes, DTYPES[dtype], "meta", 0), chosen)
    made: dict[str, CompiledKernel] = {}
    for launch in launches:
        source, options, key = _source(launch)
        if key not in made:
            made[key] = _compiled(launch, source, options, arch, keep)
    return list(made.values())


def _source(launch: Launch) -> tuple[Any, dict[str, int], str]:
    """What Triton's runtime would hand to the compiler for this launch."""
    from triton.compiler import ASTSource

    names = list(launch.function.arg_names)
    values = dict(zip(names, launch.arguments, strict=False))
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = launch.constants[name] if name in launch.constants else values[name]
        kind = "constexpr" if name in launch.constants else _kind(value)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % _ALIGNED == 0 and not isinstance(value, bool)
        ):
            attributes[(index,)] = [["tt.divisibility", _ALIGNED]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    key = f"{launch.function.__name__} {signature} {constants} {attributes} {options}"
    return ASTSource(launch.function, signature, constants, attributes), options, key


def _kind(value: Any) -> str:
    """Triton's name for the type of a run-time argument."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _compiled(
    launch: Launch, source: Any, options: dict[str, int], arch: str, keep: Path | None
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget

    said = io.StringIO()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="suanli-triton-") as cache, _fresh(cache):
        try:
            with contextlib.redirect_stdout(said):
                made = triton.compile(
                    source, target=GPUTarget("cuda", int(arch[3:]), 32), options=dict(options)
                )
        except Exception as error:
            reason = _first_line(error)
            name = launch.function.__name__
            raise SuanliError(f"{name} does not compile for {arch}: {reason}") from error
    seconds = time.perf_counter() - begin
    cubin: bytes = made.asm["cubin"]
    constants = {k: str(v) for k, v in {**launch.constants, **options}.items()}
    path = _kept(cubin, f"{launch.function.__name__}-{arch}", keep)
    usage = _usage(said.getvalue(), cubin)
    return CompiledKernel(
        name=launch.function.__name__,
        arch=arch,
        compiler=f"triton {version('triton')}",
        threads=32 * launch.num_warps,
        dynamic_shared_bytes=int(made.metadata.shared),
        cubin=path,
        seconds=seconds,
        blocks=math.prod(launch.grid),
        constants=constants,
        **usage,
    )


@contextlib.contextmanager
def _fresh(cache: str) -> Any:
    """A cache of its own: what comes from one says nothing of spills."""
    wanted = {
        "TRITON_CACHE_DIR": cache,
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    """The compiler's own words; Triton puts the place in the source first and the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _usage(log: str, cubin: bytes) -> dict[str, int]:
    """Registers, stack and spills from ptxas's words, or from the machine code without them."""
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    shared = re.search(r"(\d+) bytes smem", log)
    if registers is not None and frame is not None:
        stack, stores, loads = map(int, frame.groups())
        return {
            "registers": int(registers.group(1)),
            "stack_bytes": stack,
            "spill_store_bytes": stores,
            "spill_load_bytes": loads,
            "static_shared_bytes": int(shared.group(1)) if shared else 0,
        }
    return _dumped(cubin)


def _dumped(cubin: bytes) -> dict[str, int]:
    """The same from cuobjdump, which comes with Triton; it counts spills as stack only."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise SuanliError("cuobjdump tells no registers of what Triton compiled")
    return {"registers": int(found.group(1)), "stack_bytes": int(found.group(2))}


def _kept(cubin: bytes, name: str, keep: Path | None) -> str:
    if keep is None:
        return ""
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{name}.cubin"
    path.write_bytes(cubin)
    return str(path)
