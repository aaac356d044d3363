"""What runs inside a trial's own process: build a plan, check it, time it.

Targets of `suanli.measure.isolation.Worker`; arguments and answers are JSON.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from suanli.base import codec
from suanli.base.plan import Plan
from suanli.base.trial import ValueCheck
from suanli.devices import device
from suanli.engines.backend import JudgedBackend, Runner
from suanli.engines.backends import backends
from suanli.engines.engine import Engine
from suanli.engines.labels import Labelled, label_judge
from suanli.engines.program import Program
from suanli.engines.verification import VerificationSet, predict, read_samples
from suanli.measure.timing import measure, timed_calls
from suanli.measure.values import check_runner, compare, relative_rms

Flat = Sequence[torch.Tensor]

# Calls of a check. Of torch.compile's bf16 answers of a trained network 0.7 % of the checks with 32
# samples were refused for the gain of a channel, of 300 with 64 samples none.
_MOST_CALLS = 64


class _Host:
    """Checks and times something that takes and gives flat tensors."""

    def __init__(self, program: Program, verification: str, device_name: str) -> None:
        self._program = program
        self._set = VerificationSet(Path(verification), program)
        self._device = device(device_name)

    def _run(self, flat: Flat) -> list[torch.Tensor]:
        raise NotImplementedError

    def _place(self, flat: Flat) -> list[torch.Tensor]:
        return [tensor.to(self._device.info.name) for tensor in flat]

    def check_values(self, precision: str, batches: Sequence[int], k: float) -> dict[str, Any]:
        """Hold the outputs at several batch sizes against the float64 reference.

        At the largest batch size every verification sample goes through; at a smaller one as many
        as fill `_MOST_CALLS` calls, because each is a call of its own.

        Args:
            precision: Whose eager error is the allowance.
            batches: Batch sizes, the asked one first.
            k: How many times eager's error is allowed.
        """
        check: ValueCheck | None = None
        worst: float | None = None
        for batch in dict.fromkeys(batches):
            found = self._check_at(batch, precision, k)
            if found.relative_rms is not None:
                worst = max(worst or 0.0, found.relative_rms)
            if check is None or not found.ok:
                check = found
            if not found.ok:
                break
        assert check is not None
        done = tuple(dict.fromkeys(batches))
        result: dict[str, Any] = codec.to_json(replace(check, batches=done, relative_rms=worst))
        return result

    def _check_at(self, batch: int, precision: str, k: float) -> ValueCheck:
        """The check at one batch size; its outputs are those of the first part of the samples."""
        calls, order = self._calls(batch)
        results, stale = check_runner(self._run_on_cpu, calls)
        specs = self._program.signature.outputs
        if stale:
            return ValueCheck(ok=False, k=k, reason=f"{stale} (batch {batch})")
        reference, eager = self._set.reference(batch), self._set.eager(precision, batch)
        joined = [
            torch.cat([result[i] for result in results]) if spec.batched else results[0][i]
            for i, spec in enumerate(specs)
        ]

        found: ValueCheck | None = None
        # each part holds a sample once: repeated rows would pass for independent evidence
        for start in range(0, len(order), self._set.samples):
            part = slice(start, start + self._set.samples)
            mine = [t[part] if s.batched else t for t, s in zip(joined, specs, strict=True)]
            rows = order[part]
            theirs = [
                [t[rows] if s.batched else t for t, s in zip(tensors, specs, strict=True)]
                for tensors in (reference, eager)
            ]
            names = [spec.name for spec in specs]
            checked = compare(mine, *theirs, k=k, names=names, precision=precision)
            if not checked.ok:
                return replace(checked, reason=f"{checked.reason} (batch {batch})")
            found = found or checked
        assert found is not None
        return self._check_whole(found, results, batch, precision)

    def _check_whole(
        self, found: ValueCheck, results: Sequence[Flat], batch: int, precision: str
    ) -> ValueCheck:
        """What is one for a whole call, of the calls after the first; `found` where it is right."""
        whole = self._set.whole
        for call in range(1, len(self._set.whole_starts(batch)) if whole else 0):
            reference = self._set.reference(batch, call)
            eager = self._set.eager(precision, batch, call)
            checked = compare(
                [results[call][i] for i in whole],
                [reference[i] for i in whole],
                [eager[i] for i in whole],
                k=found.k,
                names=[self._program.signature.outputs[i].name for i in whole],
                precision=precision,
            )
            if not checked.ok:
                return replace(checked, reason=f"{checked.reason} (batch {batch})")
        return found

    def _calls(self, batch: int) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        """Calls at a batch size, at least two of different content, and their samples' indices."""
        n = self._set.samples
        count = max(2, min(_MOST_CALLS, -(-n // batch)))
        if not self._program.signature.dynamic:
            count = 1
        starts = [i * batch for i in range(count)]
        order = torch.cat([torch.arange(start, start + batch) % n for start in starts])
        return [self._set.batch(batch, start) for start in starts], order

    def relative_errors(self, batches: Sequence[int]) -> list[float | None]:
        """Largest relative RMS error of any output at each batch size.

        Relative to the RMS of the float64 reference of that output; of integers the share that
        differs. None where a value is not finite, a shape is wrong or the answers are stale.
        """
        return [self._relative_error(batch) for batch in batches]

    def _relative_error(self, batch: int) -> float | None:
        calls, order = self._calls(batch)
        results, stale = check_runner(self._run_on_cpu, calls)
        if stale:
            return None
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        reference = self._set.reference(batch)
        for i, spec in enumerate(self._program.signature.outputs):
            if spec.batched:
                pairs.append((torch.cat([result[i] for result in results]), reference[i][order]))
        for call in range(len(self._set.whole_starts(batch)) if self._set.whole else 0):
            kept = self._set.reference(batch, call)
            pairs += [(results[call][i], kept[i]) for i in self._set.whole]
        if any(mine.shape != wanted.shape for mine, wanted in pairs):
            return None
        worst = [relative_rms(mine, wanted) for mine, wanted in pairs]
        return max(worst, default=0.0) if all(map(math.isfinite, worst)) else None

    def _run_on_cpu(self, flat: Flat) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [tensor.cpu() for tensor in self._run(self._place(flat))]

    def time(self, batch: int, min_seconds: float, max_seconds: float) -> dict[str, Any]:
        """Time one call on a batch."""
        call = self._call_on(batch)
        timing = measure(
            call,
            batch=batch,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            sync=self._device.synchronize,
        )
        result: dict[str, Any] = codec.to_json(timing)
        return result

    def block(self, batch: int, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls."""
        return timed_calls(self._call_on(batch), calls, sync=self._device.synchronize)

    def _call_on(self, batch: int) -> Callable[[], object]:
        flat = self._place(self._set.batch(batch))

        def call() -> object:
            with torch.inference_mode():
                return self._run(flat)

        return call

    def predict(self, samples: str, out: str, batch: int, most: int | None = None) -> None:
        """Write the outputs on labelled samples, or on the first so many."""
        predict(self._run_on_cpu, read_samples(Path(samples)), Path(out), batch, most)


class TrialHost(_Host):
    """One plan of one backend.

    Args:
        program: Folder of the program.
        plan: The plan, as JSON.
        folder: Where the build is written, or was.
        verification: Folder of the verification set.
        backend_modules: Rows added to the backend table, see `backends`.
    """

    def __init__(
        self,
        program: str,
        plan: dict[str, Any],
        folder: str,
        verification: str,
        backend_modules: Sequence[str] = (),
    ) -> None:
        self._plan = codec.from_json(Plan, plan)
        super().__init__(Program(Path(program)), verification, self._plan.device)
        self._folder = Path(folder)
        self._backend = backends(tuple(backend_modules))[self._plan.backend]
        self._runner: Runner | None = None

    def build(
        self,
        calibration: str | None = None,
        samples: int = 0,
        labelled: dict[str, Any] | None = None,
        budget: float = 0.0,
    ) -> dict[str, Any]:
        """Build into the folder; gives the build note.

        Args:
            calibration: File of samples for plans with calibrated activations.
            samples: How many of them to use.
            labelled: Labelled samples of the search part, as JSON.
            budget: Largest drop of quality on them, as a fraction.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        batches = None
        if calibration is not None and self._plan.quantized:
            kept = read_samples(Path(calibration))
            count = min(samples or len(kept), len(kept))
            batches = [tuple(t[i : i + 1] for t in kept.inputs) for i in range(count)]
        place = (self._program, self._plan, self._folder, batches)
        if labelled is not None and isinstance(self._backend, JudgedBackend):
            part = Labelled.from_json(labelled)
            judge = label_judge(part, self._program.signature, budget)
            note = self._backend.build_judged(*place, judge)
        else:
            note = self._backend.build(*place)
        self._plan = note.plan
        result: dict[str, Any] = codec.to_json(note)
        return result

    def open(self) -> None:
        """Load what was built."""
        self._runner = self._backend.load(self._program, self._plan, self._folder)

    def _run(self, flat: Flat) -> list[torch.Tensor]:
        assert self._runner is not None
        return self._runner(flat)


class EngineHost(_Host):
    """A finished engine, opened as its user opens it.

    Args:
        engine: The engine's folder.
        verification: Folder of the verification set.
        backend_modules: Rows added to the backend table.
    """

    def __init__(self, engine: str, verification: str, backend_modules: Sequence[str] = ()) -> None:
        # its key may be a throw-away one; who made it is not in question here
        self._engine = Engine.load(Path(engine), trust=True, backends_extra=tuple(backend_modules))
        program = Program(Path(engine) / "program")
        super().__init__(program, verification, self._engine.plan.device)

    def state(self) -> dict[str, Any]:
        """Whether the engine runs as it was measured here."""
        return {"portable": self._engine.portable, "differences": list(self._engine.differences)}

    def _run(self, flat: Flat) -> list[torch.Tensor]:
        return self._engine.call_flat(flat)
