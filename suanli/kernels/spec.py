"""A kernel in a person's own Python file: CUDA C++ as a `CudaKernel`, Triton as a `Declaration`.

Both say the same: how inputs are made, what is right (a reference in PyTorch), what the work is,
and what may be tuned. A CUDA kernel also says how it is launched. The file is a program of the
person's and is run as one.
"""

import ctypes
import hashlib
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.kernels.declaration import Config, Declaration, Inputs, KernelWork, Outputs, Sizes
from suanli.workloads.userfile import guarded, load_module

MOST_THREADS = 1024  # per block, on every architecture (CUDA C++ Programming Guide, table 30)
_MOST_GRID = (2**31 - 1, 65535, 65535)
_MOST_BLOCK = (1024, 1024, 64)
_ELEMENTS = {
    "fp32": "float",
    "fp16": "__half",
    "bf16": "__nv_bfloat16",
    "fp64": "double",
    "int32": "int",
    "int8": "signed char",
}
Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a CUDA kernel is launched: what stands between `<<<` and `>>>`.

    Attributes:
        grid: Blocks along x, y, z.
        block: Threads of a block along x, y, z.
        shared_bytes: Dynamic shared memory per block.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int = 0

    @property
    def threads(self) -> int:
        """Threads per block."""
        return _product(self.block)

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return _product(self.grid)

    def checked(self, kernel: str) -> "Launch":
        """This launch with three extents each.

        Raises:
            BadInputError: It is over a limit that every architecture has.
        """
        for what, given, most in (
            ("grid", self.grid, _MOST_GRID),
            ("block", self.block, _MOST_BLOCK),
        ):
            if not 1 <= len(given) <= 3 or any(not isinstance(n, int) or n < 1 for n in given):
                raise BadInputError(
                    f"{kernel}: {what} {given} is not one to three positive numbers"
                )
            for axis, extent, limit in zip("xyz", given, most, strict=False):
                if extent > limit:
                    raise BadInputError(f"{kernel}: {what}.{axis} is {extent}, the most is {limit}")
        if self.threads > MOST_THREADS:
            raise BadInputError(
                f"{kernel}: a block of {'x'.join(map(str, self.block))} has {self.threads} threads",
                next_step=f"no GPU takes more than {MOST_THREADS}",
            )
        if self.shared_bytes < 0:
            raise BadInputError(f"{kernel}: {self.shared_bytes} bytes of shared memory")
        return Launch(
            grid=_three(self.grid), block=_three(self.block), shared_bytes=self.shared_bytes
        )


def _product(extents: tuple[int, ...]) -> int:
    made = 1
    for extent in extents:
        made *= extent
    return made


def _three(extents: tuple[int, ...]) -> tuple[int, ...]:
    return (*extents, *(1,) * (3 - len(extents)))


def _always(config: Config, sizes: Sizes) -> bool:
    return True


def _one(sizes: Sizes) -> int:
    return 1


def _no_constants(sizes: Sizes, config: Config) -> Mapping[str, int | str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """A kernel in CUDA C++ with its reference.

    Attributes:
        name: What it is called in reports.
        source: CUDA C++ text with device code only, or the path of such a file. Tunables and
            `constants` are macros in it, and `ELEMENT` is the C++ type of the chosen dtype.
        entry: Name of the `extern "C" __global__` function; `name` by default.
        inputs: (sizes, dtype, torch device, seed) -> inputs by name: tensors and numbers. The dict
            that the functions below get has the sizes under "sizes" as well.
        outputs: (sizes, dtype) -> shape and dtype of each output by name, in the order in which
            the reference gives them.
        arguments: The function's arguments in order: names of inputs, outputs or sizes. Sizes and
            whole numbers are passed as `int`, other numbers as `float`; for another type give a
            ctypes value among the inputs, a `ctypes.Structure` for a structure.
        launch: (sizes, config) -> the launch.
        reference: Inputs -> the outputs by PyTorch, in whatever dtype the inputs have.
        work: (sizes, bytes per element) -> what has to be done at least.
        tunables: Values to choose from, by the name of their macro.
        legal: (config, sizes) -> whether a configuration makes sense.
        constants: (sizes, config) -> further macros.
        default: The configuration where nothing has been tuned; the first legal one if None.
        check_sizes: Small shapes, odd ones among them.
        bench_sizes: What it is explained and timed at.
        dtypes: Of the main input.
        depth: Sizes -> how many terms are summed into one output, for the error bound.
        magnitude: Inputs -> per output, the size of the summed terms.
        roundings: How many intermediate results are stored in the inputs' dtype.
        writes: Inputs that it changes in place. They follow the outputs in the reference's answer.
        title: What it does, in a few words.
        file: The Python file that holds it; filled in when it is loaded.
    """

    name: str
    source: str | Path
    inputs: Callable[[Sizes, torch.dtype, str, int], Inputs]
    outputs: Callable[[Sizes, torch.dtype], Mapping[str, tuple[Shape, torch.dtype]]]
    arguments: tuple[str, ...]
    launch: Callable[[Sizes, Config], Launch]
    check_sizes: tuple[Sizes, ...]
    bench_sizes: tuple[Sizes, ...]
    reference: Callable[[Inputs], Outputs] | None = None
    work: Callable[[Sizes, int], KernelWork] | None = None
    entry: str = ""
    tunables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    legal: Callable[[Config, Sizes], bool] = _always
    constants: Callable[[Sizes, Config], Mapping[str, int | str]] = _no_constants
    default: Config | None = None
    dtypes: tuple[str, ...] = ("fp32",)
    depth: Callable[[Sizes], int] = _one
    magnitude: Callable[[Inputs], Outputs] | None = None
    roundings: int = 0
    writes: tuple[str, ...] = ()
    title: str = ""
    file: Path | None = None

    @property
    def function(self) -> str:
        """The entry point's name."""
        return self.entry or self.name

    def text(self) -> str:
        """The CUDA C++ source.

        Raises:
            BadInputError: The file cannot be read.
        """
        if isinstance(self.source, str):
            return self.source
        try:
            return self.source_path().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"{self.name}: cannot read {self.source}: {error}") from None

    def source_path(self) -> Path:
        """The file that the source stands in; relative paths start beside the Python file.

        A text that does not stand in the Python file as it is counts as a file of its own.
        """
        if isinstance(self.source, str):
            return self.file if self.file and self._place() >= 0 else Path(f"{self.name}.cu")
        if self.source.is_absolute() or self.file is None:
            return self.source
        return self.file.parent / self.source

    def first_line(self) -> int:
        """Line of `source_path()` on which the source begins, so that errors name that file."""
        place = self._place()
        if place < 0 or self.file is None:
            return 1
        return 1 + self.file.read_text(encoding="utf-8").count("\n", 0, place)

    def _place(self) -> int:
        """Where the source begins in the Python file; -1 where it is not found there."""
        if not isinstance(self.source, str) or self.file is None:
            return -1
        try:
            return self.file.read_text(encoding="utf-8").find(self.source)
        except (OSError, UnicodeDecodeError):
            return -1

    def configurations(self, sizes: Sizes) -> Iterator[dict[str, int]]:
        """All legal configurations at a shape, in the order of the tunables' values."""
        names = list(self.tunables)
        for values in itertools.product(*(self.tunables[name] for name in names)):
            config = dict(zip(names, values, strict=True))
            if self.legal(config, sizes):
                yield config

    def default_config(self, sizes: Sizes) -> dict[str, int]:
        """The configuration where nothing has been tuned.

        Raises:
            BadInputError: No configuration is legal at this shape.
        """
        if self.default is not None:
            return dict(self.default)
        config = next(self.configurations(sizes), None)
        if config is None:
            raise BadInputError(f"{self.name}: no configuration is legal at {dict(sizes)}")
        return config

    def launch_at(self, sizes: Sizes, config: Config) -> Launch:
        """The launch at a shape, checked against the limits of every architecture.

        Raises:
            BadInputError: It is over one of them.
        """
        launch = self.launch(sizes, config)
        if not isinstance(launch, Launch):
            raise BadInputError(
                f"{self.name}: launch gave a {type(launch).__name__}", next_step="it gives a Launch"
            )
        return launch.checked(self.name)

    def macros(self, sizes: Sizes, config: Config, dtype: str) -> dict[str, str]:
        """What the compiler is told with -D.

        Raises:
            BadInputError: The kernel does not take this dtype.
        """
        if dtype not in self.dtypes or dtype not in _ELEMENTS:
            raise BadInputError(
                f"{self.name} does not take {dtype}", next_step=f"it takes {', '.join(self.dtypes)}"
            )
        extra = {name: str(value) for name, value in self.constants(sizes, config).items()}
        return {"ELEMENT": _ELEMENTS[dtype], **{k: str(v) for k, v in config.items()}, **extra}

    def make_inputs(self, sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        """The inputs with the sizes beside them."""
        return {**self.inputs(sizes, dtype, device, seed), "sizes": dict(sizes)}

    def need_reference(self) -> Callable[[Inputs], Outputs]:
        """The reference.

        Raises:
            BadInputError: There is none, so nothing can be verified.
        """
        if self.reference is None:
            raise BadInputError(
                f"{self.name} has no reference, so nothing says what is right",
                next_step="give the kernel reference=, a function of the inputs in PyTorch",
            )
        return self.reference

    @property
    def source_hash(self) -> str:
        """SHA-256 of the source."""
        return hashlib.sha256(f"{self.function}\0{self.text()}".encode()).hexdigest()


Kernel = CudaKernel | Declaration


def scalar(value: Any) -> Any:
    """A number as the ctypes value that a kernel gets: int, float, or what ctypes type it has.

    Raises:
        BadInputError: It is neither a number nor a ctypes value, or does not fit into 32 bits.
    """
    if isinstance(value, ctypes._SimpleCData | ctypes.Structure | ctypes.Union):
        return value
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise BadInputError(
                f"{value} does not fit into int", next_step="give ctypes.c_longlong"
            )
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    raise BadInputError(f"a kernel argument cannot be a {type(value).__name__}")


def load(ref: str) -> Kernel:
    """The kernel behind "file.py" (with one kernel in it) or "file.py:name".

    Raises:
        BadInputError: There is no such file or kernel, or the file fails; its line is named.
    """
    file, _, name = ref.rpartition(":") if ".py:" in ref else (ref, "", "")
    if not file.endswith(".py"):
        raise BadInputError(
            f"{ref} is no kernel file", next_step="give a Python file that makes a CudaKernel"
        )
    path = Path(file).resolve()
    module = load_module(path)
    found = {k: v for k, v in vars(module).items() if isinstance(v, CudaKernel | Declaration)}
    chosen = [name] if name else list({id(v): k for k, v in found.items()}.values())
    if len(chosen) != 1 or chosen[0] not in found:
        what = (
            f"no kernel {name!r} in {path.name}"
            if name
            else f"{path.name} has {len(found)} kernels"
        )
        has = ", ".join(f"{path.name}:{k}" for k in found) or "no CudaKernel and no Declaration"
        raise BadInputError(what, next_step=f"it has {has}")
    kernel = found[chosen[0]]
    if isinstance(kernel, CudaKernel):
        object.__setattr__(kernel, "file", path)
        calling(kernel, lambda: _check(kernel))
    return kernel


def calling(kernel: Kernel, work: Callable[[], T]) -> T:
    """Do what calls the functions of a kernel file.

    Raises:
        BadInputError: One of them fails; the message names its line.
    """
    try:
        return work()
    except SuanliError:
        raise
    except Exception as error:
        file = kernel.file if isinstance(kernel, CudaKernel) else None
        frames = traceback.extract_tb(error.__traceback__)
        if file is None or all(Path(frame.filename) != file for frame in frames):
            raise
        cause = error

    def again() -> T:
        raise cause

    made: T = guarded(file, again)
    return made


def _check(kernel: CudaKernel) -> None:
    """Raise BadInputError on what can be seen without compiling."""
    if not kernel.check_sizes or not kernel.bench_sizes:
        raise BadInputError(f"{kernel.name}: check_sizes and bench_sizes must not be empty")
    sizes = kernel.bench_sizes[0]
    names = {*kernel.make_inputs(sizes, torch.float32, "meta", 0), *sizes}
    names |= set(kernel.outputs(sizes, torch.float32))
    unknown = [name for name in kernel.arguments if name not in names]
    if unknown:
        raise BadInputError(
            f"{kernel.name}: argument {unknown[0]!r} is no input, output or size",
            next_step=f"there are {', '.join(sorted(names - {'sizes'}))}",
        )
    if kernel.function not in kernel.text():
        raise BadInputError(f"{kernel.name}: the source has no function {kernel.function}")
