"""What `optimize` gives back where nothing beat what the person has."""

import threading
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from suanli.base.errors import SuanliError
from suanli.base.plan import Plan
from suanli.base.results import OptimizeResult
from suanli.engines._convention import Convention
from suanli.engines._gate import ForkedGate, watch_forks
from suanli.engines.backend import Backend
from suanli.engines.program import Program


class Unchanged:
    """The best baseline behind the face of an engine: callable, with a result, not to be saved.

    It runs the person's own module as PyTorch would, in this process; or the graph exported from
    it, where the module came as an object. Calls come one by one.
    """

    def __init__(
        self, program: Program, backend: Backend, folder: Path, result: OptimizeResult
    ) -> None:
        """Open the baseline `result.chosen`.

        Args:
            program: The captured model; it may go away afterwards.
            backend: The baseline's row.
            folder: What the baseline's build wrote.
            result: With the baseline as the chosen plan.
        """
        self.result = result
        self.name = result.workload
        self._convention = Convention(program.signature)
        self._runner = backend.load(program, result.chosen.plan, folder)
        self._lock: threading.Lock | ForkedGate = threading.Lock()
        self._closed = False
        watch_forks(self)

    @property
    def plan(self) -> Plan:
        """The baseline."""
        return self.result.chosen.plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's result, without gradients.

        Raises:
            ArtefactError: An argument's structure, dtype or shape is not the captured one.
            SuanliError: It is closed.
        """
        flat = self._convention.flatten(args, kwargs)
        self._convention.batch_of(flat)
        with self._lock, torch.no_grad():
            if self._closed:
                raise SuanliError(f"{self.name} is closed")
            return self._convention.unflatten(self._runner(flat))

    def save(self, folder: Path) -> Path:
        """There is nothing to save.

        Raises:
            SuanliError: Always; it says what to do.
        """
        raise SuanliError(
            f"nothing beat {self.plan.title}, so there is no engine to save in {folder}",
            next_step="keep=True gives the fastest one that can be saved",
        )

    def __reduce__(self) -> NoReturn:
        """Refuse `pickle` and `copy` in plain words.

        Raises:
            SuanliError: Always; it says what to do.
        """
        raise SuanliError(
            f"{self!r} can be neither pickled nor copied", next_step="use your own module there"
        )

    def forked(self) -> None:
        """Refuse every call: this is a child of the process that opened it."""
        self._lock = ForkedGate(self.name)

    def close(self) -> None:
        """Give back what the runner holds. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Unchanged({self.name}: {self.plan.title})"
