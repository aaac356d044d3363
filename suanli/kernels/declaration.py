"""What a kernel says of itself: its call, its reference, its cost and what can be tuned."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Sizes = Mapping[str, int]
Config = Mapping[str, int]
Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "int32": torch.int32,
    "int8": torch.int8,
}
_CODE = Path(__file__).with_name("triton_code")


@dataclass(frozen=True, kw_only=True)
class KernelWork:
    """What one call has to do at least.

    Attributes:
        flops: Operations; a multiply-add counts as two.
        bytes_read: Bytes that have to come in, each once.
        bytes_written: Bytes that have to go out, each once.
        matmul: Whether `flops` are matrix products, which tensor cores do.
    """

    flops: int
    bytes_read: int
    bytes_written: int
    matmul: bool = False

    @property
    def bytes(self) -> int:
        """All bytes that have to move."""
        return self.bytes_read + self.bytes_written


def _always(config: Config, sizes: Sizes) -> bool:
    return True


def _one(sizes: Sizes) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A kernel, the reference that it is held to, and what a search may change.

    Attributes:
        name: Unique; the key of what is stored about it.
        title: What it does, in a few words.
        inputs: (sizes, dtype, torch device, seed) -> keyword inputs; on the "meta" device too.
        sizes: Inputs -> the sizes that make them.
        run: (inputs, config) -> outputs, by Triton functions through `launching`.
        reference: Inputs -> the same outputs by PyTorch, in the inputs' own dtype or fp64.
        work: (sizes, bytes per element) -> what has to be done.
        tunables: Values to choose from, by name; `num_warps` and `num_stages` among them.
        default: Sizes -> the configuration where nothing has been tuned.
        default_fp32: The same for fp32, whose exact products take more registers; by default
            `default`.
        legal: Whether a configuration makes sense for these sizes.
        check_sizes: Small, odd ones among them.
        bench_sizes: What it is timed at.
        dtypes: Of the main input.
        code: Files in `triton_code` that hold its functions, for the hash of its source.
        depth: Sizes -> how many terms are summed into one output, for the error bound.
        magnitude: Inputs -> per output, the size of the summed terms; by default the largest
            reference value.
        roundings: How many intermediate results are stored in the inputs' dtype.
        writes: Inputs that it changes in place; `run` returns them among the outputs.
        eager: Inputs -> outputs as a person would write it in PyTorch; by default the reference.
        fallback: Inputs -> outputs for where there is no Triton; by default the reference. Needed
            where that uses autograd, which is off inside an operator.
        traffic: (config, sizes, bytes per element) -> bytes that pass between the multiprocessors
            and L2 when tiles are read again; by default what `work` moves.
        libraries: Published rivals by name: inputs -> outputs; they import what they need.
        files: Host files that launch it, for the hash of its source.
    """

    name: str
    title: str
    inputs: Callable[[Sizes, torch.dtype, str, int], Inputs]
    sizes: Callable[[Inputs], Sizes]
    run: Callable[[Inputs, Config], Outputs]
    reference: Callable[[Inputs], Outputs]
    work: Callable[[Sizes, int], KernelWork]
    tunables: Mapping[str, tuple[int, ...]]
    default: Callable[[Sizes], Config]
    check_sizes: tuple[Sizes, ...]
    bench_sizes: tuple[Sizes, ...]
    code: tuple[str, ...]
    legal: Callable[[Config, Sizes], bool] = _always
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    depth: Callable[[Sizes], int] = _one
    magnitude: Callable[[Inputs], Outputs] | None = None
    roundings: int = 0
    writes: tuple[str, ...] = ()
    eager: Callable[[Inputs], Outputs] | None = None
    fallback: Callable[[Inputs], Outputs] | None = None
    traffic: Callable[[Config, Sizes, int], int] | None = None
    libraries: Mapping[str, Callable[[Inputs], Outputs]] | None = None
    default_fp32: Callable[[Sizes], Config] | None = None
    files: tuple[Path, ...] = ()

    def elsewhere(self, inputs: Inputs) -> Outputs:
        """The outputs without Triton."""
        return (self.fallback or self.reference)(inputs)

    def default_for(self, sizes: Sizes, dtype: str) -> Config:
        """The configuration where nothing has been tuned."""
        chosen = self.default_fp32 if dtype == "fp32" else None
        return (chosen or self.default)(sizes)

    @property
    def source_hash(self) -> str:
        """SHA-256 of the files with its functions and of the host code that launches them."""
        digest = hashlib.sha256()
        for path in (*(_CODE / f"{name}.py" for name in self.code), *self.files):
            digest.update(path.read_bytes())
        return digest.hexdigest()


class Source:
    """Random inputs, the same for the same seed on one device; bare shapes on "meta".

    Args:
        device: torch's name of the device.
        seed: Any number.
    """

    def __init__(self, device: str, seed: int) -> None:
        self._device = device
        self._generator: torch.Generator | None = None
        if device != "meta":
            self._generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Normal values of mean 0 and deviation `scale`."""
        made = torch.empty(shape, dtype=torch.float32, device=self._device)
        if self._generator is not None:
            made.normal_(0.0, scale, generator=self._generator)
        return made.to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Values from 0 to 1."""
        made = torch.empty(shape, dtype=torch.float32, device=self._device)
        if self._generator is not None:
            made.uniform_(0.0, 1.0, generator=self._generator)
        return made.to(dtype)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        """Whole numbers from `low` to `high` - 1."""
        made = torch.empty(shape, dtype=dtype, device=self._device)
        if self._generator is not None:
            made.random_(low, high, generator=self._generator)
        return made


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in beside tensors of this dtype: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors among the inputs, by name; those of a list as "name.0", "name.1" and so on."""
    found: dict[str, torch.Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}.{i}": t for i, t in enumerate(value) if isinstance(t, torch.Tensor)}
    return found


def mapped(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The same inputs with `change` applied to every tensor."""
    made: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            made[name] = change(value)
        elif isinstance(value, list):
            made[name] = [change(t) if isinstance(t, torch.Tensor) else t for t in value]
        else:
            made[name] = value
    return made


def doubled(inputs: Inputs) -> Inputs:
    """The same inputs with floating-point tensors as fp64 copies, the others as plain copies."""
    return mapped(inputs, lambda t: t.double() if t.is_floating_point() else t.clone())


def gradients(
    forward: Callable[[Inputs], Outputs],
    inputs: Inputs,
    wanted: tuple[str, ...],
    upstream: tuple[torch.Tensor, ...],
) -> Outputs:
    """Gradients of a reference by torch's autograd.

    Args:
        forward: Inputs -> outputs, differentiable.
        inputs: What it is called with.
        wanted: Inputs whose gradients are asked for.
        upstream: One gradient for each of the first outputs.
    """
    with torch.enable_grad():
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        outputs = forward({**inputs, **leaves})[: len(upstream)]
        return torch.autograd.grad(outputs, [leaves[name] for name in wanted], upstream)
