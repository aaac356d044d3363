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
from suanli.base.errors import BadInputError
from suanli.engines.program import Program
from suanli.measure.values import eager_too_far, relative_rms
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
# of an output's size: how far two calls in the same precision may be apart; what sums in another
# order make is far below, but for models whose fp32 answer is mostly rounding
_STEADY = {"float64": 1e-6, "float32": 1e-2}
_WHOLE_CALLS = 2  # per batch size: an answer that never changes shows at the second
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
        digest = _digest(batched, row)
        if digest in seen:
            return row
        seen.add(digest)
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


def halves(
    program: Program, flat: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs in two parts that share no sample: the even rows, and of the odd ones those not there.

    Args:
        program: Gives the signature.
        flat: Flat inputs of an even number of samples. What is no sample goes to both parts.
    """
    specs = program.signature.inputs
    rows = next((len(t) for t, s in zip(flat, specs, strict=True) if s.batched), 0)
    batched = [t for t, spec in zip(flat, specs, strict=True) if spec.batched]
    seen = {_digest(batched, row) for row in range(0, rows, 2)}
    odd = [row for row in range(1, rows, 2) if _digest(batched, row) not in seen]

    def part(order: Sequence[int]) -> list[torch.Tensor]:
        index = torch.tensor(list(order), dtype=torch.int64)
        return [
            t[index].contiguous() if spec.batched else t
            for t, spec in zip(flat, specs, strict=True)
        ]

    return part(range(0, rows, 2)), part(odd)


def _digest(batched: Sequence[torch.Tensor], row: int) -> bytes:
    digest = hashlib.sha256()
    for tensor in batched:
        digest.update(tensor[row].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


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

    @property
    def whole(self) -> list[int]:
        """Indices of the outputs whose first dimension is not the batch."""
        specs = self.program.signature.outputs
        return [index for index, spec in enumerate(specs) if not spec.batched]

    def whole_starts(self, batch: int) -> list[int]:
        """First samples of the calls at a batch size whose whole outputs are kept."""
        return [i * batch for i in range(_WHOLE_CALLS if self.program.signature.dynamic else 1)]

    def reference(self, batch: int | None = None, call: int = 0) -> list[torch.Tensor]:
        """Outputs of the reference, floats in float64, each [N, ...].

        Args:
            batch: Batch size whose outputs that are one for a whole call are wanted.
            call: Which of `whole_starts` they belong to.
        """
        kept = self._read(_REFERENCE, batch, call)
        return [t.double() if t.is_floating_point() else t for t in kept]

    def eager(self, precision: str, batch: int | None = None, call: int = 0) -> list[torch.Tensor]:
        """Eager's outputs at a precision, in the signature's dtypes, each [N, ...]."""
        return self._read(f"eager-{precision}.safetensors", batch, call)

    def _read(self, file: str, batch: int | None, call: int) -> list[torch.Tensor]:
        stored = load_file(self.folder / file)
        specs = self.program.signature.outputs
        outputs = [stored[str(i)] for i in range(len(specs))]
        if batch is not None:
            for index in self.whole:
                outputs[index] = stored[_whole_key(batch, call, index)]
        return [
            torch.view_as_complex(t) if spec.dtype.startswith("complex") else t
            for t, spec in zip(outputs, specs, strict=True)
        ]

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
        batches: Batch sizes that are promised, for outputs that are one for a whole call.
    """

    def __init__(
        self, program: str, folder: str, device: str = "cpu", batches: Sequence[int] = ()
    ) -> None:
        self._program = Program(Path(program))
        self._folder = Path(folder)
        self._set = VerificationSet(self._folder, self._program)
        self._device = device
        self._batches = tuple(batches)

    def reference(self) -> dict[str, Any]:
        """Write the float64 outputs; float32 where the model does not run in float64.

        Raises:
            BadInputError: The answer is not finite, differs from call to call, or depends on the
                other samples of the batch.
        """
        note, dtype = "", torch.float64
        module = self._program.source_module()
        try:
            outputs = self._run(module, dtype, "cpu")
        except (RuntimeError, TypeError, NotImplementedError) as error:
            note = f"no float64 reference: {str(error).strip().splitlines()[0][:120]}"
            module, dtype = self._program.source_module(), torch.float32
            outputs = self._run(module, dtype, "cpu")
        if not all(torch.isfinite(t).all() for t in outputs):
            raise BadInputError(
                "the model's own fp32 answer holds NaN or Inf on its example inputs",
                next_step="give inputs on which the model works",
            )
        self._check_steady(module, dtype, outputs)
        self._save(_REFERENCE, outputs, self._whole(module, dtype, "cpu"))
        info = ReferenceInfo(
            dtype="float32" if note else "float64", samples=self._set.samples, note=note
        )
        (self._folder / _INFO).write_text(codec.dumps(info), encoding="utf-8")
        result: dict[str, Any] = codec.to_json(info)
        return result

    def eager(self, precision: str) -> str:
        """Write eager's outputs at a precision (the model and its inputs cast to it).

        Returns:
            Why no plan can be proved right at this precision; "" if one can.
        """
        if precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        module, dtype = self._program.source_module(), _DTYPES[precision]
        specs = self._program.signature.outputs

        def as_given(index: int, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(getattr(torch, specs[index].dtype))

        outputs = [as_given(i, t) for i, t in enumerate(self._run(module, dtype, self._device))]
        whole = self._whole(module, dtype, self._device)
        self._save(
            f"eager-{precision}.safetensors",
            outputs,
            {key: as_given(int(key.rpartition(":")[2]), t) for key, t in whole.items()},
        )
        names = [spec.name for spec in specs]
        return eager_too_far(outputs, self._set.reference(), names, precision)

    def predict(self, samples: str, out: str, batch: int) -> None:
        """Write eager fp32's outputs on labelled samples."""
        module = self._program.source_module()
        predict(
            lambda flat: self._program.call(module, flat),
            read_samples(Path(samples)),
            Path(out),
            batch,
        )

    def _check_steady(
        self, module: nn.Module, dtype: torch.dtype, outputs: Sequence[torch.Tensor]
    ) -> None:
        """Call again with the first samples, then with single ones: the answers must not change.

        Raises:
            BadInputError: They do.
        """
        most = _STEADY[str(dtype).removeprefix("torch.")]
        specs, samples = self._program.signature.outputs, self._set.samples
        step = self._step
        again = self._call(module, dtype, "cpu", step, 0)
        for spec, now, then in zip(specs, again, outputs, strict=True):
            rows = min(step, samples)
            pair = (now[:rows], then[:rows]) if spec.batched else (now, then)
            if not (apart := relative_rms(*pair)) <= most:
                raise BadInputError(
                    "the model's answer changes from call to call on the same inputs "
                    f"({spec.name} by {apart:.2g} of its size), so nothing can be verified",
                    next_step="it draws random numbers or keeps a state: take dropout or noise "
                    "out of forward",
                )
        if not self._program.signature.dynamic or samples < _FEWEST_SAMPLES:
            return
        for row in range(_FEWEST_SAMPLES):
            alone = self._call(module, dtype, "cpu", 1, row)
            for spec, now, then in zip(specs, alone, outputs, strict=True):
                if spec.batched and not relative_rms(now, then[row : row + 1]) <= most:
                    raise BadInputError(
                        "the answer for a sample depends on the other samples of its batch "
                        f"({spec.name}), so no engine for any batch can be right",
                        next_step="give a Workload with dynamic_batch=False for one fixed batch",
                    )

    def _whole(self, module: nn.Module, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        """What is one for a whole call, at every promised batch size: it may depend on the call."""
        if not self._set.whole:
            return {}
        found = {}
        for batch in dict.fromkeys(self._batches):
            for call, start in enumerate(self._set.whole_starts(batch)):
                outputs = self._call(module, dtype, device, batch, start)
                for index in self._set.whole:
                    found[_whole_key(batch, call, index)] = outputs[index]
        return found

    def _save(
        self, file: str, outputs: Sequence[torch.Tensor], whole: dict[str, torch.Tensor]
    ) -> None:
        tensors = {str(i): t for i, t in enumerate(outputs)} | whole
        save_file({key: _storable(t) for key, t in tensors.items()}, self._folder / file)

    @property
    def _step(self) -> int:
        """Samples of one call of the reference."""
        signature = self._program.signature
        if not signature.dynamic:
            return signature.max_batch
        return min(_CHUNK, self._set.samples, signature.max_batch)

    @torch.inference_mode()
    def _call(
        self, module: nn.Module, dtype: torch.dtype, device: str, batch: int, start: int
    ) -> list[torch.Tensor]:
        flat = self._set.batch(batch, start)
        cast = [(t.to(dtype) if t.is_floating_point() else t).to(device) for t in flat]
        return [t.cpu() for t in self._program.call(module, cast)]

    def _run(self, module: nn.Module, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        """Outputs on all verification samples, of a module that is cast in place."""
        module.to(device=device, dtype=dtype)
        starts = range(0, self._set.samples, self._step)
        parts = [self._call(module, dtype, device, self._step, start) for start in starts]
        return [
            torch.cat([part[i] for part in parts])[: self._set.samples]
            if spec.batched
            else parts[0][i]
            for i, spec in enumerate(self._program.signature.outputs)
        ]


@torch.inference_mode()
def predict(run: Any, samples: Samples, out: Path, batch: int, most: int | None = None) -> None:
    """Run labelled samples through `run(flat) -> flat` in batches and keep the first output.

    That is the one that labels judge, and its first dimension is the batch. With `most` only so
    many samples are run, the first ones.
    """
    parts: list[torch.Tensor] = []
    n = len(samples) if most is None else min(most, len(samples))
    for start in range(0, n, batch):
        # the last batch is filled up with the first samples, for programs of one fixed batch
        order = torch.arange(start, start + batch) % n
        flat = [t[order].contiguous() for t in samples.inputs]
        answer = run(flat)[0]
        parts.append(answer.float() if answer.is_floating_point() else answer)
    save_file({"0": torch.cat(parts)[:n].contiguous()}, out)


def read_outputs(path: Path) -> torch.Tensor:
    """What `predict` kept, [N, ...]."""
    return load_file(path)["0"]


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """As safetensors takes it: complex numbers, of which it has one size only, as pairs."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.contiguous().clone()


def _whole_key(batch: int, call: int, index: int) -> str:
    return f"whole:{batch}:{call}:{index}"


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= 1 if size == -1 else size
    return total
