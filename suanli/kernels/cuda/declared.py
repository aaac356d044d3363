"""A CUDA kernel as the declaration that checking and tuning take, run through the CUDA driver."""

from dataclasses import dataclass
from pathlib import Path

import torch

from suanli.kernels import launching
from suanli.kernels.cuda.driver import Driver
from suanli.kernels.declaration import Config, Declaration, Inputs, KernelWork, Outputs, Sizes
from suanli.kernels.dtypes import short_name
from suanli.kernels.spec import CudaKernel


def declaration(kernel: CudaKernel) -> Declaration:
    """The same kernel as a `Declaration`; its `run` compiles and launches on a GPU.

    Raises:
        BadInputError: It has no reference.
    """
    reference = kernel.need_reference()
    work = kernel.work or _no_work
    file = kernel.file or Path(__file__)
    files = (file,) if isinstance(kernel.source, str) else (file, kernel.source_path())
    return Declaration(
        name=kernel.name,
        title=kernel.title,
        inputs=kernel.make_inputs,
        sizes=lambda inputs: dict(inputs["sizes"]),
        run=_Runner(kernel),
        reference=reference,
        work=work,
        tunables=kernel.tunables,
        default=kernel.default_config,
        legal=kernel.legal,
        check_sizes=kernel.check_sizes,
        bench_sizes=kernel.bench_sizes,
        dtypes=kernel.dtypes,
        code=(),
        files=files,
        depth=kernel.depth,
        magnitude=kernel.magnitude,
        roundings=kernel.roundings,
        writes=kernel.writes,
    )


def _no_work(sizes: Sizes, element_bytes: int) -> KernelWork:
    return KernelWork(flops=0, bytes_read=0, bytes_written=0)


@dataclass(frozen=True)
class _Runner:
    """Inputs and configuration to outputs, on the GPU where the inputs are."""

    kernel: CudaKernel

    def __call__(self, inputs: Inputs, config: Config) -> Outputs:
        kernel, sizes = self.kernel, inputs["sizes"]
        tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        device = tensors[0].device
        dtype = main_dtype(kernel, tensors)
        made = {
            name: launching.empty(shape, kind, device)
            for name, (shape, kind) in kernel.outputs(sizes, dtype).items()
        }
        Driver.here().launch(kernel, {**inputs, **made}, config, short_name(dtype), device)
        return (*made.values(), *(inputs[name] for name in kernel.writes))


def main_dtype(kernel: CudaKernel, tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype that a call is about: the first tensor's that the kernel takes by name."""
    for tensor in tensors:
        if short_name(tensor.dtype) in kernel.dtypes:
            return tensor.dtype
    return tensors[0].dtype
