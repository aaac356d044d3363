"""The samples on which plans are verified, and eager's own answers on them.

The folder holds the verification inputs, the float64 reference, what eager makes of them at each
precision, and the labelled samples of the search part. Acceptance samples stand in a folder of
their own, which no trial gets to see.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from suanli.base import codec
from suanli.base.errors import SuanliError
from suanli.engines.program import Program
from suanli.workloads.record import Samples

_INPUTS, _REFERENCE, _INFO = "inputs.safetensors", "reference.safetensors", "info.json"
_MOST_ELEMENTS = 24_000_000  # of one output over all samples: 200 MB in float64
_MOST_SAMPLES = 128
_LEAST_SAMPLES = 32  # fewer say little of a channel's mean error
_FEWEST_SAMPLES = 2  # where one output is so large that no more fit the memory
# of the reference over all samples: some 8 s in float64 on two cores, where ResNet-50 reached
# 60 GFLOP/s
_MOST_FLOPS = 480e9
_CHUNK = 16
_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class ReferenceInfo:
    """How the reference was made.

    Attributes:
        dtype: "float64", or "float32" where the model does not run in float64.
        samples: How many verification samples there are.
        note: Why it is not float64; "" if it is.
    """

    dtype: str
    samples: int
    note: str = ""


def how_many(program: Program, flops: float | None) -> int:
    """Verification samples that a float64 reference can afford.

    The number follows from the work alone: what is verified must not depend on how fast or how busy
    the machine is.

    Args:
        program: The model.
        flops: Operations per sample; None where they could not be counted.
    """
    largest = max((_elements(spec.shape) for spec in program.signature.outputs), default=1)
    by_memory = _MOST_ELEMENTS // max(largest, 1)
    by_work = int(_MOST_FLOPS / max(flops, 1.0)) if flops is not None else 0
    affordable = max(_LEAST_SAMPLES, min(_MOST_SAMPLES, by_work))
    return max(_FEWEST_SAMPLES, min(affordable, by_memory))


def distinct_samples(flat: Sequence[torch.Tensor], samples: int) -> int:
    """How many samples come before the first that repeats an earlier one.

    Example inputs that were given once are repeated to fill a batch; repeated samples are no
    evidence of their own.

    Args:
        flat: Flat inputs; those whose first dimension is `samples` are looked at.
        samples: The batch.
    """
    batched = [t for t in flat if t.dim() and t.shape[0] == samples]
    seen: set[bytes] = set()
    for row in range(samples):
        digest = hashlib.sha256()
        for tensor in batched:
            digest.update(tensor[row].contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if digest.digest() in seen:
            return row
        seen.add(digest.digest())
    return samples


def vary(program: Program, stored: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    """Verification inputs from the few that the user gave, when no source of more is known.

    Floating-point samples are mixed in equal parts with Gaussian noise of their own mean and
    spread and kept within their range: samples that hardly differ would hide a wrong gain. Integer
    samples are permuted along their last dimension. The first ones stay as they were given.

    Args:
        program: Gives the signature.
        stored: Flat example inputs, each [n, ...].
        samples: How many are wanted.
    """
    generator = torch.Generator().manual_seed(20)
    varied = []
    for spec, tensor in zip(program.signature.inputs, stored, strict=True):
        if not spec.batched:
            varied.append(tensor)
            continue
        given = tensor.shape[0]
        times = -(-samples // given)
        many = tensor.repeat(times, *[1] * (tensor.dim() - 1))[:samples].clone()
        if tensor.is_floating_point() and samples > given:
            known = tensor.float()
            spread = torch.nan_to_num(known.std())
            noise = torch.randn(many[given:].shape, generator=generator) * spread + known.mean()
            mixed = known.mean() + (many[given:] - known.mean() + noise - known.mean()) / 2**0.5
            many[given:] = mixed.clamp(known.min(), known.max()).to(tensor.dtype)
        elif tensor.dim() > 1:
            for row in range(given, samples):
                order = torch.randperm(tensor.shape[-1], generator=generator)
                many[row] = many[row][..., order]
        varied.append(many)
    return varied


def write_inputs(folder: Path, flat: Sequence[torch.Tensor]) -> None:
    """Keep the verification inputs, each [N, ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(i): t.contiguous().clone() for i, t in enumerate(flat)}, folder / _INPUTS)


def write_samples(path: Path, samples: Samples) -> None:
    """Keep labelled samples for other processes."""
    tensors = {str(i): t.contiguous().clone() for i, t in enumerate(samples.inputs)}
    if samples.labels is not None:
        tensors["labels"] = samples.labels.contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def read_samples(path: Path) -> Samples:
    """What `write_samples` kept."""
    stored = load_file(path)
    labels = stored.pop("labels", None)
    return Samples(inputs=tuple(stored[str(i)] for i in range(len(stored))), labels=labels)


class VerificationSet:
    """Reads the folder in any process."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.folder = folder
        self.program = program
        stored = load_file(folder / _INPUTS)
        self.inputs = [stored[str(i)] for i in range(len(stored))]

    @property
    def samples(self) -> int:
        """Verification samples at hand."""
        for spec, tensor in zip(self.program.signature.inputs, self.inputs, strict=True):
            if spec.batched:
                return int(tensor.shape[0])
        return 1

    def batch(self, size: int, start: int = 0) -> list[torch.Tensor]:
        """Flat inputs of `size` samples from `start` on, going round at the end of the set."""
        order = torch.arange(start, start + size) % self.samples
        return [
            tensor[order].contiguous() if spec.batched else tensor
            for spec, tensor in zip(self.program.signature.inputs, self.inputs, strict=True)
        ]

    def reference(self) -> list[torch.Tensor]:
        """Outputs of the reference, in float64, each [N, ...]."""
        return [t.double() for t in _in_order(load_file(self.folder / _REFERENCE))]

    def eager(self, precision: str) -> list[torch.Tensor]:
        """Eager's outputs at a precision, in the signature's dtypes, each [N, ...]."""
        return _in_order(load_file(self.folder / f"eager-{precision}.safetensors"))

    @property
    def info(self) -> ReferenceInfo:
        """How the reference was made."""
        return codec.read(ReferenceInfo, self.folder / _INFO)


class ReferenceHost:
    """Target of a worker: computes the reference and eager's own answers.

    Args:
        program: Folder of the program.
        folder: The verification folder, with its inputs written.
        device: Device that eager's lower precisions are run on.
    """

    def __init__(self, program: str, folder: str, device: str = "cpu") -> None:
        self._program = Program(Path(program))
        self._folder = Path(folder)
        self._set = VerificationSet(self._folder, self._program)
        self._device = device

    def reference(self) -> dict[str, Any]:
        """Write the float64 outputs; float32 where the model does not run in float64."""
        note = ""
        try:
            outputs = self._run(self._program.source_module(), torch.float64, "cpu")
        except (RuntimeError, TypeError, NotImplementedError) as error:
            note = f"no float64 reference: {str(error).strip().splitlines()[0][:120]}"
            outputs = self._run(self._program.source_module(), torch.float32, "cpu")
        if not all(torch.isfinite(t).all() for t in outputs if t.is_floating_point()):
            raise SuanliError(
                "the model's own fp32 answer holds NaN or Inf on its example inputs",
                next_step="give inputs on which the model works",
            )
        _save_in_order(self._folder / _REFERENCE, outputs)
        info = ReferenceInfo(
            dtype="float32" if note else "float64", samples=self._set.samples, note=note
        )
        (self._folder / _INFO).write_text(codec.dumps(info), encoding="utf-8")
        result: dict[str, Any] = codec.to_json(info)
        return result

    def eager(self, precision: str) -> None:
        """Write eager's outputs at a precision (the model and its inputs cast to it)."""
        if precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        outputs = self._run(self._program.source_module(), _DTYPES[precision], self._device)
        _save_in_order(
            self._folder / f"eager-{precision}.safetensors",
            [
                t.to(getattr(torch, spec.dtype))
                for t, spec in zip(outputs, self._program.signature.outputs, strict=True)
            ],
        )

    def predict(self, samples: str, out: str, batch: int) -> None:
        """Write eager fp32's outputs on labelled samples."""
        module = self._program.source_module()
        predict(
            lambda flat: self._program.call(module, flat),
            read_samples(Path(samples)),
            Path(out),
            batch,
        )

    @torch.inference_mode()
    def _run(self, module: nn.Module, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        module = module.to(device=device, dtype=dtype)
        parts = []
        signature = self._program.signature
        step = signature.max_batch
        if signature.dynamic:
            step = min(_CHUNK, self._set.samples, step)
        for start in range(0, self._set.samples, step):
            flat = self._set.batch(step, start)
            cast = [(t.to(dtype) if t.is_floating_point() else t).to(device) for t in flat]
            parts.append([t.cpu() for t in self._program.call(module, cast)])
        return [
            torch.cat([part[i] for part in parts])[: self._set.samples]
            if spec.batched
            else parts[0][i]
            for i, spec in enumerate(self._program.signature.outputs)
        ]


@torch.inference_mode()
def predict(run: Any, samples: Samples, out: Path, batch: int) -> None:
    """Run labelled samples through `run(flat) -> flat` in batches and keep the outputs.

    Raises:
        ValueError: An output's first dimension is not the batch.
    """
    parts: list[list[torch.Tensor]] = []
    n = len(samples)
    for start in range(0, n, batch):
        # the last batch is filled up with the first samples, for programs of one fixed batch
        order = torch.arange(start, start + batch) % n
        flat = [t[order].contiguous() for t in samples.inputs]
        parts.append([t.float() if t.is_floating_point() else t for t in run(flat)])
    outputs = [torch.cat([part[i] for part in parts])[:n] for i in range(len(parts[0]))]
    _save_in_order(out, outputs)


def read_outputs(path: Path) -> list[torch.Tensor]:
    """What `predict` kept, each [N, ...]."""
    return _in_order(load_file(path))


def _save_in_order(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    save_file({str(i): t.contiguous().clone() for i, t in enumerate(tensors)}, path)


def _in_order(stored: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [stored[str(i)] for i in range(len(stored))]


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= 1 if size == -1 else size
    return total
