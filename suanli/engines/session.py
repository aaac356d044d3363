"""What one search works on: the captured program, the verification set and eager's answers."""

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from suanli.base import units
from suanli.base.errors import BadInputError, CaptureError
from suanli.base.events import Event, Listener
from suanli.base.files import cache_dir
from suanli.base.leftovers import temporary_folder
from suanli.base.work import Work
from suanli.engines.evaluate import SCREENED, Setting, reference_setup
from suanli.engines.fitness import check_data, check_example
from suanli.engines.labels import Labelled
from suanli.engines.program import Program, capture, flatten_call
from suanli.engines.verification import (
    distinct_samples,
    halves,
    how_many,
    vary,
    write_inputs,
    write_samples,
)
from suanli.measure.capture import capture as capture_work
from suanli.measure.isolation import Worker
from suanli.workloads.record import Data, Inputs, Samples, Workload

_REFERENCE_HOST = "suanli.engines.verification:ReferenceHost"
_CALIBRATION_SAMPLES = 128
_FINGERPRINTED = (
    "graph.json",
    "weights.safetensors",
    "inputs.safetensors",
    "samples.safetensors",
    "calibration.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the person asked for, as far as the session needs it.

    Attributes:
        batch: Samples in the step that decides.
        max_batch: Largest batch of the engine.
        budget: Largest drop of quality, as a fraction.
        tolerance: Largest relative error of quantised plans without labels.
        device: "cpu", "cuda:0", …
        backend_modules: Rows added to the backend table.
    """

    batch: int
    max_batch: int
    budget: float = 0.005
    tolerance: float | None = None
    device: str = "cpu"
    backend_modules: tuple[str, ...] = ()


class Session:
    """Captures a workload and keeps what its trials need in a scratch folder."""

    def __init__(
        self, workload: Workload, model: nn.Module, wish: Wish, scratch: Path, listener: Listener
    ) -> None:
        """Capture the model and write the verification inputs.

        Raises:
            CaptureError: The model does not run on its example inputs.
            BadInputError: The disk has no room, or inputs or labelled data make no sense.
        """
        self.workload, self.wish, self.scratch = workload, wish, scratch
        self._listener = listener
        self._reference_worker: Worker | None = None
        self._allowances: dict[str, str] = {}
        self.process_s = 0.0  # from the start of a worker to its first answer
        _check_room(model, scratch)
        self._say("capturing the model")
        self.program = self._capture(model)
        self.batches = self._batch_sizes()
        self.eager_ms = _quick_ms(model, self._example(model))
        self.work = self._count(model)
        self.data = self._load_data()
        self._write_verification()
        self.setting = self._setting()

    @property
    def search_samples(self) -> int:
        """Labelled samples that most plans are run on in the search."""
        return min(SCREENED, len(self.data.search)) if self.data is not None else 0

    def reference(self, *, timeout_s: float = 600.0) -> str:
        """Compute the reference in a process of its own.

        Returns:
            Why it is not float64; "" if it is.

        Raises:
            BadInputError: The model's own answer is not finite, differs from call to call, or mixes
                the samples of a batch.
            TrialFailedError: The process crashed, hung or outgrew the memory.
        """
        self._say("computing the float64 reference")
        started = time.monotonic()
        worker = self._references()
        self.process_s = time.monotonic() - started
        info = worker.call("reference", timeout_s=timeout_s)
        if self.data is not None:
            self._predict_eager("search", timeout_s)
        return str(info["note"])

    def allowance(self, precision: str) -> str:
        """Make sure that eager's own outputs at a precision are there.

        Returns:
            Why no plan can be proved right at this precision; "" if one can.
        """
        if precision not in self._allowances:
            found = self._references().call("eager", timeout_s=600.0, precision=precision)
            self._allowances[precision] = found
        return self._allowances[precision]

    def acceptance(self, *, timeout_s: float = 600.0) -> Labelled | None:
        """Labelled samples that no trial has seen, with eager fp32's outputs on them."""
        if self.data is None:
            return None
        return self._predict_eager("acceptance", timeout_s)

    def fingerprint(self) -> str:
        """Names the program, its weights and the samples that trials are judged on."""
        digest = hashlib.sha256()
        for folder in ("program", "search"):
            for name in _FINGERPRINTED:
                path = self.scratch / folder / name
                if path.exists():
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def close(self) -> None:
        """End the reference process."""
        if self._reference_worker is not None:
            self._reference_worker.close()
            self._reference_worker = None

    def _say(self, text: str) -> None:
        self._listener(Event(kind="step", text=text))

    def _capture(self, model: nn.Module) -> Program:
        workload = self.workload
        dynamic = workload.dynamic_batch and self.wish.max_batch > 1
        size = 2 if dynamic else self.wish.batch
        inputs = workload.make_inputs(size)
        check_example(model, inputs, dynamic=dynamic)
        return capture(
            model,
            inputs,
            folder=self.scratch / "program",
            name=workload.name,
            ref=workload.ref,
            max_batch=self.wish.max_batch,
            dynamic=dynamic,
        )

    def _batch_sizes(self) -> tuple[int, ...]:
        """The asked batch first, then the others that are promised."""
        signature = self.program.signature
        if not signature.dynamic:
            if self.wish.batch != signature.max_batch:
                raise CaptureError(
                    f"{self.workload.name} can only be captured at the batch of its example inputs "
                    f"({signature.max_batch}), not at {self.wish.batch}",
                    next_step=f"--batch {signature.max_batch}",
                )
            return (signature.max_batch,)
        return tuple(dict.fromkeys((self.wish.batch, 1, self.wish.max_batch)))

    def _count(self, model: nn.Module) -> Work | None:
        """The work of one step; None where the model cannot be exported."""
        if not self.program.meta.exported:
            return None
        self._say("counting the work")
        batch = self.batches[0]
        example = self.workload.make_inputs(batch)
        return capture_work(model, example.args, example.kwargs, batch=batch)

    def _example(self, model: nn.Module) -> Inputs:
        return self.workload.make_inputs(2 if self.program.signature.dynamic else self.wish.batch)

    def _load_data(self) -> Data | None:
        if self.workload.data is None or self.workload.metric is None or self.workload.untrained:
            return None
        self._say("loading the labelled data")
        data = self.workload.load()
        data = replace(data, train=data.train.head(_CALIBRATION_SAMPLES))  # no more is looked at
        check_data(data, self.workload.metric, self.program.signature)
        return data

    def _write_verification(self) -> None:
        flops = self.work.flops / self.batches[0] if self.work is not None else None
        samples = how_many(self.program, flops)
        signature = self.program.signature
        if not signature.dynamic:
            samples = signature.max_batch
        if self.data is not None and len(self.data.search) >= samples:
            flat = [t[:samples] for t in self.data.search.inputs]
        elif self.data is None and self.wish.tolerance is not None:
            flat, self._spare = halves(self.program, self._examples(2 * samples))
        else:
            flat = self._examples(samples)
        write_inputs(self.scratch / "verification", flat)

    def _examples(self, samples: int) -> list[torch.Tensor]:
        """Flat example inputs; those that repeat an earlier one are varied."""
        signature = self.program.signature
        if signature.dynamic:
            inputs = self.workload.make_inputs(samples)
            flat = flatten_call(signature, inputs.args, dict(inputs.kwargs))
        else:
            flat = self.program.inputs(samples)
        given = distinct_samples(flat, samples)
        if given == samples or (not signature.dynamic and samples == signature.max_batch):
            return list(flat)
        first = [
            t[:given] if spec.batched else t for t, spec in zip(flat, signature.inputs, strict=True)
        ]
        return vary(self.program, first, samples)

    def _setting(self) -> Setting:
        calibration, search = None, None
        self.calibration_samples = 0
        if self.data is not None:
            calibration = self.scratch / "search" / "calibration.safetensors"
            train = self.data.train
            count = self.calibration_samples = min(_CALIBRATION_SAMPLES, len(train))
            write_samples(calibration, train.head(count))
            search = self._labelled("search")
            write_samples(search.samples, self.data.search)
        elif self.wish.tolerance is not None:
            calibration = self._unlabelled_calibration()
        return Setting(
            program=self.program.folder,
            verification=self.scratch / "verification",
            builds=self.scratch / "builds",
            batch=self.batches[0],
            other_batches=self.batches[1:],
            budget=self.wish.budget,
            tolerance=self.wish.tolerance,
            calibration=calibration,
            search=search,
            backend_modules=self.wish.backend_modules,
        )

    def _unlabelled_calibration(self) -> Path:
        """Calibration samples from the example inputs, for a tolerance without labels.

        None of them is among the verification samples, on which the plan is judged.
        """
        spare = Samples(inputs=tuple(self._spare))
        self.calibration_samples = min(_CALIBRATION_SAMPLES, len(spare))
        path = self.scratch / "search" / "calibration.safetensors"
        write_samples(path, spare)
        return path

    def _labelled(self, part: str) -> Labelled:
        assert self.data is not None
        assert self.workload.metric is not None
        folder = self.scratch / part
        return Labelled(
            samples=folder / "samples.safetensors",
            reference=folder / "eager.safetensors",
            metric=self.workload.metric,
            classes=self.data.classes,
        )

    def _predict_eager(self, part: str, timeout_s: float) -> Labelled:
        assert self.data is not None
        labelled = self._labelled(part)
        if not labelled.samples.exists():
            write_samples(labelled.samples, getattr(self.data, part))
        self._references().call(
            "predict",
            timeout_s=timeout_s,
            samples=str(labelled.samples),
            out=str(labelled.reference),
            batch=self.setting.batch,
        )
        return labelled

    def _references(self) -> Worker:
        if self._reference_worker is None or not self._reference_worker.alive:
            setup = reference_setup(self.setting, self.wish.device)
            self._reference_worker = Worker(_REFERENCE_HOST, setup)
        return self._reference_worker


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode; each of its parts is as it was before, afterwards."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards; leftovers of killed processes are removed too.

    Raises:
        OSError: No folder can be made.
    """
    parent = cache_dir() / "scratch"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = temporary_folder(parent, "")
    except OSError:
        folder = temporary_folder(None, "suanli-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(model: nn.Module, scratch: Path) -> None:
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed = 4 * weights + 2**26
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise BadInputError(
            f"no disk space: {units.size(needed)} are needed in {scratch.parent}, "
            f"{units.size(free)} are free",
            next_step="set SUANLI_CACHE to a folder on another disk",
        )


@torch.inference_mode()
def _quick_ms(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds per sample of eager fp32, roughly: the better of two calls after one."""
    model(*inputs.args, **inputs.kwargs)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        model(*inputs.args, **inputs.kwargs)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3 / 2
