"""The facts from which problems are found, gathered once and apart from the judging."""

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suanli.base.compiler import find_compiler
from suanli.base.lazy import present, version
from suanli.devices import request_amx
from suanli.devices.cgroup import cpu_quota
from suanli.devices.cpu_facts import allowed_cpus
from suanli.devices.gpu_facts import driver_versions

# OpenMP runtimes by the names of their libraries.
_OPENMP = {"libgomp": "GNU", "libiomp5": "Intel", "libomp": "LLVM", "vcomp": "Microsoft"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides whether this environment is sound. None where it could not be read.

    Attributes:
        torch: Version of torch.
        torch_cuda: CUDA version that torch was built for; None for a CPU build.
        torch_sees_gpu: Whether torch can use a GPU.
        torch_arches: What torch was compiled for, such as ("sm_80", "compute_90").
        torch_error: Why torch does not import, or "".
        cudnn: cuDNN version that torch loaded, as a number.
        driver_cuda: Newest CUDA version that the driver runs.
        gpu_nodes: GPU device files of the system, which exist even without a usable driver.
        nvml: Whether the NVML binding is installed.
        visible_devices: CUDA_VISIBLE_DEVICES, or None where it is not set.
        openmp: Makers of the OpenMP runtimes loaded in this process.
        omp_threads: OMP_NUM_THREADS, or None.
        allowed_cpus: Processors allowed by affinity.
        cpu_quota: Cores granted by the cgroup.
        compiler: The C compiler's name, or None.
        cxx: Whether a C++ compiler is there, which torch.compile needs on the CPU.
        amx_allowed: Whether the kernel grants tile registers.
        numpy: Version of numpy.
        nncf: Version of NNCF.
        load_average: Processes that wanted to run over the last minute.
    """

    torch: str | None = None
    torch_cuda: str | None = None
    torch_sees_gpu: bool = False
    torch_arches: tuple[str, ...] = ()
    torch_error: str = ""
    cudnn: int | None = None
    driver_cuda: str | None = None
    gpu_nodes: tuple[str, ...] = ()
    nvml: bool = False
    visible_devices: str | None = None
    openmp: tuple[str, ...] = ()
    omp_threads: int | None = None
    allowed_cpus: int = 1
    cpu_quota: float | None = None
    compiler: str | None = None
    cxx: bool = True
    amx_allowed: bool | None = None
    numpy: str | None = None
    nncf: str | None = None
    load_average: float | None = None


def gather_facts(root: Path = Path("/")) -> Facts:
    """Read the facts of this process; imports torch.

    Args:
        root: Where `dev` and `proc` stand.
    """
    torch_facts = _torch_facts()
    compiler = find_compiler()
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return Facts(
        **torch_facts,
        driver_cuda=driver_versions()[1],
        gpu_nodes=tuple(sorted(p.name for p in (root / "dev").glob("nvidia[0-9]*"))),
        nvml=present("pynvml"),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        openmp=openmp_runtimes(root),
        omp_threads=int(threads) if threads.isdigit() else None,
        allowed_cpus=len(allowed_cpus()),
        cpu_quota=cpu_quota(root),
        compiler=compiler.kind if compiler else None,
        cxx=has_cxx(),
        amx_allowed=request_amx(),
        numpy=version("numpy"),
        nncf=version("nncf"),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def has_cxx() -> bool:
    """Whether torch.compile would find a C++ compiler: the one in CXX, else g++ or clang++."""
    import shutil

    chosen = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (*chosen[:1], "g++", "clang++", "c++", "cl"))


def openmp_runtimes(root: Path = Path("/")) -> tuple[str, ...]:
    """Makers of the OpenMP runtimes loaded in this process (Linux), sorted."""
    try:
        maps = (root / "proc/self/maps").read_text()
    except (OSError, UnicodeDecodeError):
        return ()
    # Packages ship them under names such as libgomp-24e2ab19.so.1.0.0.
    names = set(re.findall(r"/(lib[a-z]+5?)(?:-[0-9a-f]+)?\.so", maps))
    return tuple(sorted({_OPENMP[name] for name in names if name in _OPENMP}))


def _torch_facts() -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken install may raise anything, OSError for a library too
        return {"torch": version("torch"), "torch_error": f"{error}".strip().partition("\n")[0]}
    sees = bool(torch.cuda.is_available())
    return {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "torch_sees_gpu": sees,
        "torch_arches": tuple(torch.cuda.get_arch_list()) if sees else (),
        "cudnn": torch.backends.cudnn.version() if sees else None,
    }
