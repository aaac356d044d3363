"""Which configuration a kernel runs with: the tuned winner of this device, or the default."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.files import cache_dir, write_atomic
from suanli.base.lazy import present, version
from suanli.devices import device
from suanli.kernels.declaration import DTYPES, Config, Declaration, Inputs, Sizes


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best verified configuration of one kernel at one shape on one device.

    Attributes:
        kernel: The kernel's name.
        source_hash: Of its source when it was tuned.
        sizes: The shape.
        dtype: Of the main input, such as "bf16".
        device: The device's fingerprint.
        compiler: Such as "triton 3.9.0".
        config: The configuration.
        step_ms: Median time; None where it was ranked and not timed.
        rivals_ms: Median times of "eager", "torch.compile" and libraries in the same run.
        speedup_lo95: Lower 95 % limit of the fastest rival's time over this one's, from a race on
            new timings; None where none was run.
        verified: Whether its outputs were checked on this device.
        ranked: Whether it is the first of a static ranking, and nothing was timed.
    """

    kernel: str
    source_hash: str
    sizes: dict[str, int]
    dtype: str
    device: str
    compiler: str
    config: dict[str, int]
    step_ms: float | None = None
    rivals_ms: dict[str, float] = field(default_factory=dict)
    speedup_lo95: float | None = None
    verified: bool = False
    ranked: bool = False

    @property
    def faster(self) -> bool:
        """Whether it was verified here and measured faster than every rival tried."""
        return self.verified and self.speedup_lo95 is not None and self.speedup_lo95 > 1.0


def compiler_version() -> str:
    """Name and version of the installed Triton, which decides what a configuration is worth."""
    return f"triton {version('triton') or 'absent'}"


def _path(kernel: Declaration, sizes: Sizes, dtype: str, fingerprint: str) -> Path:
    key = codec.dumps(
        {
            "kernel": kernel.name,
            "source": kernel.source_hash,
            "sizes": dict(sorted(sizes.items())),
            "dtype": dtype,
            "device": fingerprint,
            "compiler": compiler_version(),
        }
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return cache_dir() / "kernels" / f"{kernel.name}-{digest}.json"


def store(kernel: Declaration, winner: Winner) -> Path:
    """Keep a winner for later processes; gives the file.

    Raises:
        OSError: The cache cannot be written.
    """
    path = _path(kernel, winner.sizes, winner.dtype, winner.device)
    write_atomic(path, codec.dumps(winner))
    tuned.cache_clear()
    return path


def find(kernel: Declaration, sizes: Sizes, dtype: str, fingerprint: str) -> Winner | None:
    """The winner kept for exactly this source, shape, device and compiler, or None.

    A damaged file counts as none: what it says can be measured again.
    """
    path = _path(kernel, sizes, dtype, fingerprint)
    if not path.is_file():
        return None
    try:
        winner = codec.read(Winner, path)
    except ArtefactError:
        return None
    same = (winner.kernel, winner.source_hash, winner.compiler, winner.device) == (
        kernel.name,
        kernel.source_hash,
        compiler_version(),
        fingerprint,
    )
    return winner if same else None


@cache
def _fingerprint(torch_device: str) -> str:
    return device(torch_device).info.fingerprint


_KERNELS: dict[str, Declaration] = {}


@cache
def tuned(name: str, sizes: str, dtype: str, torch_device: str) -> Winner | None:
    """`find` with plain arguments, kept for the life of the process.

    Args:
        name: A kernel that was registered by `choose`.
        sizes: As sorted JSON.
        dtype: Such as "bf16".
        torch_device: Such as "cuda:0".
    """
    return find(_KERNELS[name], json.loads(sizes), dtype, _fingerprint(torch_device))


def choose(kernel: Declaration, inputs: Inputs, example: torch.Tensor) -> Config:
    """The configuration for a call on `example`'s device and dtype.

    A winner that was only ranked is used as well: it is a guess, but no worse one than the default.
    """
    sizes, dtype = kernel.sizes(inputs), short(example)
    _KERNELS.setdefault(kernel.name, kernel)
    key = json.dumps(dict(sorted(sizes.items())))
    winner = tuned(kernel.name, key, dtype, str(example.device))
    return kernel.default_for(sizes, dtype) if winner is None else winner.config


def short(tensor: torch.Tensor) -> str:
    """A tensor's dtype by its short name."""
    for name, dtype in DTYPES.items():
        if dtype == tensor.dtype:
            return name
    return str(tensor.dtype).removeprefix("torch.")


@cache
def _triton() -> bool:
    return present("triton")


def usable(*given: torch.Tensor) -> bool:
    """Whether the Triton code can take these tensors: all on one GPU, with Triton here."""
    return all(t.is_cuda for t in given) and _triton()


def checked_config(kernel: Declaration, config: Config, sizes: Sizes) -> Config:
    """The configuration itself.

    Raises:
        BadInputError: It has a name that cannot be tuned, lacks one, or is not legal.
    """
    if config.keys() != kernel.tunables.keys():
        wrong = sorted(config.keys() ^ kernel.tunables.keys())
        raise BadInputError(f"{kernel.name}: the configuration is off at {', '.join(wrong)}")
    if not kernel.legal(config, sizes):
        raise BadInputError(f"{kernel.name}: {dict(config)} is not legal for {dict(sizes)}")
    return config
