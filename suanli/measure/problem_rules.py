"""One rule per thing that can be wrong with an environment. Rules look at facts only.

Install commands name PyTorch's own package index where the build matters, because PyPI's default
build differs by platform.
"""

from collections.abc import Callable, Iterator

from suanli.base.hardware import CpuInfo, GpuInfo, Problem
from suanli.base.units import size
from suanli.measure.facts import Facts

_LEAST_TORCH = (2, 11)
_LITTLE_MEMORY = 2 * 2**30
_INDEX = "https://download.pytorch.org/whl"
Rule = Callable[[CpuInfo, list[GpuInfo], Facts], Iterator[Problem]]


def apply(cpu: CpuInfo, gpus: list[GpuInfo], facts: Facts) -> list[Problem]:
    """All problems that the rules find, in the rules' order."""
    return [problem for rule in _RULES for problem in rule(cpu, gpus, facts)]


def _torch_broken(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if facts.torch_error:
        yield Problem(
            what=f"torch does not import: {facts.torch_error}",
            mend="pip install --force-reinstall torch",
        )
    elif facts.torch is not None and _numbers(facts.torch) < _LEAST_TORCH:
        yield Problem(
            what=f"torch {facts.torch} is older than the oldest that is supported, 2.11",
            mend="pip install --upgrade 'torch>=2.11'",
        )


def _gpu_unused(_cpu: CpuInfo, gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    """A GPU is in the machine, and torch cannot use it: say which link of the chain is broken."""
    if facts.torch_sees_gpu or not (gpus or facts.gpu_nodes) or facts.torch_error:
        return
    name = gpus[0].name if gpus else "a GPU"
    newest = facts.driver_cuda
    wheel = _wheel(newest, gpus[0].compute_capability if gpus else None)
    if facts.torch_cuda is None:
        yield Problem(
            what=f"{name} is here, but this torch ({facts.torch}) is built for the CPU only",
            mend=f"pip install --force-reinstall torch --index-url {_INDEX}/{wheel}",
        )
    elif facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
        yield Problem(
            what=f"{name} is hidden: CUDA_VISIBLE_DEVICES is {facts.visible_devices!r}",
            mend="unset CUDA_VISIBLE_DEVICES",
        )
    elif newest is not None and _numbers(facts.torch_cuda) > _numbers(newest):
        yield Problem(
            what=f"torch is built for CUDA {facts.torch_cuda}, the driver runs at most {newest}",
            mend=f"update the NVIDIA driver, or pip install --force-reinstall torch "
            f"--index-url {_INDEX}/{wheel}",
        )
    elif newest is None:
        yield Problem(
            what=f"{name} is here, but the NVIDIA driver does not answer",
            mend="install the NVIDIA driver, run nvidia-smi to see what it says, and in a "
            "container start it with --gpus all",
        )
    else:
        yield Problem(
            what=f"{name} is here, but torch cannot open it",
            mend="python -c 'import torch; torch.zeros(1).cuda()' shows the reason",
        )


def _driver_major(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    """Within one major version a newer CUDA runs on an older driver; across majors it does not."""
    if not facts.torch_sees_gpu or facts.torch_cuda is None or facts.driver_cuda is None:
        return
    built, runs = _numbers(facts.torch_cuda), _numbers(facts.driver_cuda)
    if built[0] > runs[0]:
        yield Problem(
            what=f"torch is built for CUDA {facts.torch_cuda}, the driver is of CUDA "
            f"{facts.driver_cuda}: kernels compiled here may not load",
            mend=f"update the NVIDIA driver, or pip install --force-reinstall torch "
            f"--index-url {_INDEX}/{_wheel(facts.driver_cuda)}",
        )


def _architectures(_cpu: CpuInfo, gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if not facts.torch_arches:
        return
    for gpu in gpus:
        capability = gpu.compute_capability
        if capability is not None and not runs_on(capability, facts.torch_arches):
            built = ", ".join(facts.torch_arches)
            yield Problem(
                what=f"torch has no kernels for {gpu.name} (capability {capability}): it is "
                f"compiled for {built}",
                mend=f"pip install --force-reinstall torch --index-url "
                f"{_INDEX}/{_wheel(facts.driver_cuda, capability)}",
            )


def runs_on(capability: str, arches: tuple[str, ...]) -> bool:
    """Whether code for these targets runs on a card.

    Binary code ("sm_80") runs on its own major version with an equal or higher minor one; PTX
    ("compute_80") on every equal or newer card; targets ending in "a" only on exactly that card,
    those in "f" on its family. Source: CUDA programming guide, "Application Compatibility".
    """
    major, _, minor = capability.partition(".")
    card = (int(major), int(minor or 0))
    for arch in arches:
        kind, _, digits = arch.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        built = (int(number[:-1]), int(number[-1]))
        same_major = built[0] == card[0] and built[1] <= card[1]
        if digits.endswith("a"):
            fits = built == card
        elif kind == "compute":
            fits = built <= card
        else:
            fits = same_major
        if fits:
            return True
    return False


def _cudnn(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if facts.torch_sees_gpu and facts.cudnn is None:
        yield Problem(
            what="torch finds no cuDNN: convolutions take slow paths",
            mend="pip install --force-reinstall torch, and remove other cuDNN libraries from "
            "LD_LIBRARY_PATH",
        )


def _nvml(_cpu: CpuInfo, gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if not facts.nvml and (gpus or facts.gpu_nodes or facts.torch_sees_gpu):
        yield Problem(
            what="without NVML the GPU's clocks, power and energy cannot be read",
            mend="pip install nvidia-ml-py",
        )


def _amx(cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if "amx_tile" in cpu.features and facts.amx_allowed is False:
        yield Problem(
            what="the processor has matrix units (AMX), but this process may not use them: bf16 "
            "and int8 run many times slower",
            mend="allow arch_prctl in the sandbox or seccomp profile, and use Linux 5.16 or newer",
        )


def _threads(cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    usable = cpu.usable_cores
    if facts.omp_threads is not None and facts.omp_threads > usable:
        yield Problem(
            what=f"OMP_NUM_THREADS is {facts.omp_threads}, but only {usable} cores may be used: "
            "threads wait for each other",
            mend=f"export OMP_NUM_THREADS={usable}",
        )
    if facts.omp_threads is not None and facts.omp_threads < usable:
        yield Problem(
            what=f"OMP_NUM_THREADS is {facts.omp_threads}: {usable - facts.omp_threads} of "
            f"{usable} cores stay idle",
            mend="unset OMP_NUM_THREADS",
        )
    quota = facts.cpu_quota
    if quota is not None and quota < facts.allowed_cpus:
        yield Problem(
            what=f"the container may use {quota:g} of the {facts.allowed_cpus} cores that it "
            "sees: libraries that start a thread per core are stopped again and again",
            mend=f"export OMP_NUM_THREADS={usable}, or raise the container's CPU limit",
        )


def _openmp(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if len(facts.openmp) > 1:
        yield Problem(
            what=f"several OpenMP runtimes are loaded ({', '.join(facts.openmp)}): each keeps "
            "threads of its own that spin against the others",
            mend="install torch and numpy from the same source (both from PyPI or both from "
            "conda), and unset LD_PRELOAD",
        )


def _compiler(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if facts.compiler is None:
        yield Problem(
            what="no C compiler: the processor's limits can only be derived, not measured",
            mend="apt-get install gcc, or pip install 'suanli[compiler]'",
        )
    if not facts.cxx:
        yield Problem(
            what="no C++ compiler: torch.compile and AOTInductor do not work on the CPU",
            mend="apt-get install g++",
        )


def _versions(_cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    if facts.nncf and facts.numpy and _numbers(facts.numpy) >= (2, 5):
        yield Problem(
            what=f"NNCF {facts.nncf} needs numpy below 2.5, this is {facts.numpy}",
            mend="pip install 'numpy<2.5'",
        )


def _memory(cpu: CpuInfo, _gpus: list[GpuInfo], _facts: Facts) -> Iterator[Problem]:
    if cpu.memory_available_bytes < _LITTLE_MEMORY:
        yield Problem(
            what=f"only {size(cpu.memory_available_bytes)} of memory are free: builds may be ended "
            "by the system",
            mend="close other programs, or raise the container's memory limit",
        )


def _load(cpu: CpuInfo, _gpus: list[GpuInfo], facts: Facts) -> Iterator[Problem]:
    load = facts.load_average
    if load is not None and load > cpu.usable_cores:
        yield Problem(
            what=f"the machine is busy (load {load:.1f} on {cpu.usable_cores} cores): figures come "
            "out lower than the machine can do",
            mend="stop other work, then `suanli doctor --refresh`",
        )


def _numbers(text: str) -> tuple[int, int]:
    """Major and minor of a version such as "2.13.0+cpu"; (0, 0) where it has none."""
    parts = text.partition("+")[0].split(".")
    digits = [int(part) for part in parts[:2] if part.isdigit()]
    return (digits[0], digits[1]) if len(digits) == 2 else (digits[0] if digits else 0, 0)


def _wheel(cuda: str | None, capability: str | None = None) -> str:
    """PyTorch's index for a driver and a card.

    Source: PyTorch's RELEASE.md, CUDA support matrix. 2.11 to 2.14 are all built for CUDA 12.6,
    which still holds cards before Turing, and for CUDA 13.0, which holds Blackwell.
    """
    if capability is not None and _numbers(capability) < (7, 5):
        return "cu126"
    if capability is not None and _numbers(capability) >= (10, 0):
        return "cu130"
    return "cu130" if cuda is not None and _numbers(cuda) >= (13, 0) else "cu126"


_RULES: tuple[Rule, ...] = (
    _torch_broken,
    _gpu_unused,
    _driver_major,
    _architectures,
    _cudnn,
    _nvml,
    _amx,
    _threads,
    _openmp,
    _compiler,
    _versions,
    _memory,
    _load,
)
