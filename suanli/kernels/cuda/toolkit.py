"""Where NVIDIA's compilers and tools are: an installed toolkit, or packages from PyPI."""

import importlib.util
import os
import shutil
from functools import cache
from pathlib import Path

from suanli.base.lazy import version

INSTALL = "pip install 'suanli[kernels]'"


@cache
def nvcc() -> Path | None:
    """The CUDA compiler of an installed toolkit, or None."""
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        path = Path(root) / "bin" / "nvcc" if root else None
        if path is not None and path.is_file():
            return path
    return None


@cache
def nvrtc_libraries() -> tuple[Path, ...]:
    """The runtime compilers from PyPI and the toolkit, the newest first."""
    found: list[Path] = []
    for root in _packages():
        found += sorted(root.glob("*/lib/libnvrtc.so.*"))
    compiler = nvcc()
    if compiler is not None:
        for folder in ("lib64", "targets/x86_64-linux/lib"):
            found += sorted((compiler.resolve().parent.parent / folder).glob("libnvrtc.so.*"))
    real = [p for p in found if ".alt." not in p.name and "builtins" not in p.name]
    return tuple(sorted(dict.fromkeys(real), key=lambda p: p.name, reverse=True))


@cache
def include_folders() -> tuple[Path, ...]:
    """Folders with cuda_fp16.h and mma.h for the runtime compiler, from PyPI or the toolkit."""
    found = [path for root in _packages() for path in sorted(root.glob("*/include"))]
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root and (Path(root) / "include" / "cuda_fp16.h").is_file():
            found.append(Path(root) / "include")
    found += [path / "cccl" for path in found]  # where CUDA 13 keeps libcu++
    marks = ("cuda_fp16.h", "crt", "cuda/std")
    return tuple(path for path in found if any((path / mark).exists() for mark in marks))


@cache
def disassembler() -> Path | None:
    """Nvdisasm from the path, Triton's package, or `nvidia-cuda-nvdisasm`; or None."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/nvdisasm"
        if path.is_file():
            return path
    return next((p for root in _packages() for p in sorted(root.glob("*/bin/nvdisasm"))), None)


def nvrtc_name(library: Path) -> str:
    """Name and version of a runtime compiler, such as "NVRTC 12.9.86"."""
    major = library.name.removeprefix("libnvrtc.so.").partition(".")[0]
    for package in (f"nvidia-cuda-nvrtc-cu{major}", "nvidia-cuda-nvrtc"):
        known = version(package)
        if known and known.partition(".")[0] == major:
            return f"NVRTC {known}"
    return f"NVRTC {major}"


def compilers() -> tuple[str, ...]:
    """All of them, for the key of what depends on them."""
    tool = nvcc()
    own = () if tool is None else (f"{tool.resolve()} of {tool.stat().st_mtime_ns}",)
    return (*own, *map(nvrtc_name, nvrtc_libraries()))


def _packages() -> list[Path]:
    """Folders of the `nvidia` namespace that pip's packages share."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) for place in places or ()]
