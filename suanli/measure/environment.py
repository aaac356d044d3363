"""What a measurement depends on beside the plan, and what in it costs speed or will break."""

import os
import platform
from importlib import metadata

from suanli import __version__
from suanli.base.hardware import CpuInfo, Environment, GpuInfo, Problem
from suanli.devices import cpu_info, gpu_infos
from suanli.measure import problem_rules
from suanli.measure.facts import Facts, gather_facts

# Distributions whose version changes what is computed or how fast.
_LIBRARIES = (
    *("torch", "numpy", "openvino", "nncf", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript"),
    *("tensorrt", "torchao", "transformers", "keras", "triton", "safetensors", "scikit-learn"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


def environment() -> Environment:
    """The environment of this process. Reads metadata only; imports none of the libraries."""
    cpu, gpus = cpu_info(), gpu_infos(use_torch=False)
    return Environment(
        suanli=__version__,
        python=platform.python_version(),
        os=f"{platform.system()} {platform.machine()}",
        machine=machine_title(cpu, gpus),
        cores=cpu.usable_cores,
        libraries=library_versions(),
        driver=next((gpu.driver for gpu in gpus if gpu.driver), None),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def library_versions() -> dict[str, str]:
    """Installed version of each library that matters, by distribution name."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_title(cpu: CpuInfo, gpus: list[GpuInfo]) -> str:
    """Processor with its widest units, and the GPUs, in one line.

    Virtual machines name very different processors alike; the units tell them apart.
    """
    wide = ("avx2", "avx512f", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8", "i8mm", "sve")
    units = [feature for feature in wide if feature in cpu.features]
    title = f"{cpu.model} [{' '.join(units)}]" if units else cpu.model
    names = [gpu.name for gpu in gpus]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return " + ".join([title, *counted])


def problems(
    *, cpu: CpuInfo | None = None, gpus: list[GpuInfo] | None = None, facts: Facts | None = None
) -> list[Problem]:
    """What costs speed or will break here, each with how to mend it; the gravest first.

    Args:
        cpu: The processor; read where None.
        gpus: The GPUs; read where None.
        facts: Everything else; gathered where None (which imports torch).
    """
    known = facts or gather_facts()
    processor = cpu or cpu_info()
    cards = gpu_infos() if gpus is None else gpus
    return problem_rules.apply(processor, cards, known)
