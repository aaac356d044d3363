"""An engine: a built, verified, saved inference artefact, and the callable that it opens as."""

import logging
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from suanli.base.errors import ArtefactError, BadInputError, MissingBackendError, SuanliError
from suanli.base.plan import Plan
from suanli.base.results import OptimizeResult
from suanli.base.signature import Signature
from suanli.engines import signing
from suanli.engines._convention import Convention
from suanli.engines._fit import Here, differences, here, misfit
from suanli.engines._gate import ForkedGate, Gate, watch_forks
from suanli.engines.assembly import BuiltVariant, copy_engine, write_engine
from suanli.engines.backend import Backend, LayerTime, Runner
from suanli.engines.exchange import export, run_file
from suanli.engines.manifest import PROGRAM, Manifest, Numbers, Variant, check
from suanli.engines.program import Program

__all__ = ["BuiltVariant", "Engine", "Numbers", "export", "run_file", "write_engine"]

_Key = tuple[tuple[torch.dtype, torch.Size], ...]

PORTABLE_PLAN = Plan(backend="eager", precision="fp32")
_log = logging.getLogger(__name__)


class Engine:
    """Callable with the model's own arguments; gives the model's own result, without gradients.

    Any number of threads may call it. A batch larger than `max_batch` is computed in parts, a
    batch of no samples gives an empty result. Inputs need not be contiguous; their dtypes and
    shapes must be the captured ones. Use it as a context manager, or `close` it.
    """

    def __init__(
        self,
        *,
        folder: Path,
        manifest: Manifest,
        program: Program,
        served: "Sequence[_Served]",
        differences: Sequence[str],
        temporary: bool,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.program = program
        self.differences = tuple(differences)
        self._served = tuple(served)
        self._convention = Convention(manifest.signature)
        self._gate: Gate | ForkedGate = Gate(manifest.name)
        self._device = manifest.device.name.partition(":")[0]
        self._on_cuda = self._device == "cuda"
        self._max_batch = manifest.max_batch
        # dtypes and shapes that passed the checks; one entry per batch size at most
        self._checked: dict[_Key, _Served] = {}
        self._temporary = temporary
        self._result: OptimizeResult | None = None
        self._release = weakref.finalize(self, _release, folder if temporary else None, served)
        watch_forks(self)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        trust: bool = False,
        backends_extra: Sequence[str] = (),
        portable: bool | None = None,
        on_warning: Callable[[str], None] | None = None,
        temporary: bool = False,
    ) -> Self:
        """Open a saved engine.

        Where it was built for another machine or other libraries, or a backend is absent, what
        cannot be used is replaced by the portable plan: the exported program in eager fp32.

        Args:
            folder: What `write_engine` wrote.
            trust: Open it although nobody whose key is trusted here made it. It may run any code
                with your rights.
            backends_extra: Rows added to the backend table, as "module:ATTRIBUTE".
            portable: True for the portable plan only; False for the built plans even on another
                machine, where nobody has verified them; None decides by what differs.
            on_warning: Told in one line what differs; by default it is logged.
            temporary: Remove the folder when the engine is closed or forgotten.

        Raises:
            ArtefactError: It is damaged or incomplete.
            UntrustedError: It holds what can run code, and no trusted key vouches for it.
            SuanliError: Neither its plans nor the portable one can run here.
        """
        folder = Path(folder)
        manifest = check(folder, trust=trust)
        program = Program(folder / PROGRAM)
        if program.signature != manifest.signature or program.meta.ref != manifest.workload:
            raise ArtefactError(f"the program in {folder.name} is not the one of its manifest")
        now = here(manifest.device.name)
        found = differences(manifest, now)
        loader = _Loader(folder, manifest, program, now, backends_extra)
        served, why_not = loader.load_all(portable)
        tell = on_warning or _log.warning
        if why_not:
            found += why_not
            tell(
                f"{manifest.name} runs its portable plan, slower than measured: "
                f"{'; '.join(why_not)}; `suanli rebuild` makes it anew for this machine"
            )
        elif found:
            tell(f"{manifest.name} was measured elsewhere: {'; '.join(found)}")
        return cls(
            folder=folder,
            manifest=manifest,
            program=program,
            served=served,
            differences=found,
            temporary=temporary,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's result.

        Raises:
            ArtefactError: An argument's structure, dtype or shape is not the captured one.
            SuanliError: The engine is closed.
        """
        convention = self._convention
        if convention.flat_call and not kwargs:
            served = self._known(args)
            if served is not None:
                return convention.unflatten(self._run(served, args))
        return convention.unflatten(self.call_flat(convention.flatten(args, kwargs)))

    def call_flat(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the flat outputs from the flat inputs, both in the signature's order.

        Raises:
            ArtefactError: A tensor's dtype or shape is not the captured one.
            SuanliError: The engine is closed.
        """
        known = self._known(inputs)
        if known is not None:
            return self._run(known, inputs)
        batch = self._convention.batch_of(inputs)
        if batch == 0:
            return self._convention.empty_result()
        ready = [self._ready(i, tensor) for i, tensor in enumerate(inputs)]
        if batch <= self.max_batch:
            served = self._serving(batch)
            self._checked[_key(inputs)] = served
            return self._run(served, ready)
        with self._gate, torch.no_grad():
            sizes = [self.max_batch] * (batch // self.max_batch)
            if batch % self.max_batch:
                sizes.append(batch % self.max_batch)
            parts = self._convention.split(ready, sizes)
            done = [
                self._serving(size).run([tensor.contiguous() for tensor in part])
                for size, part in zip(sizes, parts, strict=True)
            ]
            return [torch.cat(column) for column in zip(*done, strict=True)]

    def _known(self, inputs: Sequence[Any]) -> "_Served | None":
        """Who serves a call whose dtypes and shapes were checked before; None for any other.

        None also where a tensor has to be brought into the form that runners take.
        """
        try:
            served = self._checked.get(_key(inputs))
        except (AttributeError, TypeError):  # no tensors: the checks have the clear words for it
            return None
        if served is not None:
            for tensor in inputs:
                if not (
                    (tensor.is_cpu or (self._on_cuda and tensor.is_cuda))
                    and not tensor.requires_grad
                    and tensor.layout is torch.strided
                    and tensor.is_contiguous()
                ):
                    return None
        return served

    def _run(self, served: "_Served", inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with self._gate:
            if not torch.is_grad_enabled():
                return served.run(inputs)
            with torch.no_grad():
                return served.run(inputs)

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> list[LayerTime]:
        """Per-layer times of one call on flat inputs; empty where the backend has no counters.

        Raises:
            BadInputError: The batch is empty or larger than `max_batch`.
        """
        batch = self._convention.batch_of(inputs)
        if not 1 <= batch <= self.max_batch:
            raise BadInputError(f"layers are timed on 1 to {self.max_batch} samples, not {batch}")
        ready = [self._ready(i, tensor) for i, tensor in enumerate(inputs)]
        with self._gate, torch.no_grad():
            return self._serving(batch).layer_times(ready)

    def save(self, folder: Path) -> Path:
        """Keep a copy of the engine; an older engine in `folder` gives way to it.

        Returns:
            The folder.

        Raises:
            BadInputError: The folder holds something that is no engine, or cannot be written.
            SuanliError: There is no space, or the engine is closed.
        """
        with self._gate:
            # A temporary engine may bear a throw-away key. Any other keeps its maker's signature:
            # copying somebody's engine is not vouching for it.
            key = signing.own_key() if self._temporary else None
            copy_engine(self.folder, Path(folder), key=key)
        return Path(folder)

    def close(self) -> None:
        """Wait for calls in flight, then give back what the engine holds. May be called twice."""
        self._gate.close()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse `pickle` and `copy` in plain words."""
        raise SuanliError(
            f"the engine {self.name} can be neither pickled nor copied",
            next_step="save(folder), and suanli.load(folder) where it is needed",
        )

    def forked(self) -> None:
        """Refuse every call: this is a child of the process that opened the engine."""
        self._release.detach()  # threads and folder are the parent's
        self._checked = {}
        self._gate = ForkedGate(self.manifest.name)

    def __repr__(self) -> str:
        titles = ", ".join(plan.title for plan in self.plans)
        return f"Engine({self.name}: {titles}{', portable' if self.portable else ''})"

    @property
    def name(self) -> str:
        """The model's short name."""
        return self.manifest.name

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans that serve here, one a variant; the portable one where it stands in."""
        return tuple(served.plan for served in self._served)

    @property
    def plan(self) -> Plan:
        """The first plan."""
        return self._served[0].plan

    @property
    def numbers(self) -> Numbers:
        """What was measured and verified when, and where, the engine was made."""
        return self.manifest.numbers

    @property
    def signature(self) -> Signature:
        """The model's calling convention."""
        return self.manifest.signature

    @property
    def max_batch(self) -> int:
        """Largest batch that is computed in one part."""
        return self._max_batch

    @property
    def portable(self) -> bool:
        """Whether the portable plan stands in for any variant."""
        return any(served.portable for served in self._served)

    @property
    def result(self) -> OptimizeResult:
        """What the search said that made this engine in this process.

        Raises:
            SuanliError: The engine was opened from a folder; `numbers` has what it carries.
        """
        if self._result is None:
            raise SuanliError("an engine from a folder has no search result, only `numbers`")
        return self._result

    @result.setter
    def result(self, result: OptimizeResult) -> None:
        self._result = result

    def _serving(self, batch: int) -> "_Served":
        for served in self._served:
            if served.variant.min_batch <= batch <= served.variant.max_batch:
                return served
        raise BadInputError(f"no variant of {self.name} serves batch {batch}")

    def _ready(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cpu and tensor.layout is torch.strided:
            if not tensor.requires_grad and tensor.is_contiguous():
                return tensor
            return tensor.detach().contiguous()
        device = self._device
        if tensor.device.type not in ("cpu", device) or tensor.layout != torch.strided:
            raise BadInputError(
                f"{self.signature.inputs[index].name} is a {tensor.layout} tensor on "
                f"{tensor.device}; this engine takes dense tensors on {device}"
            )
        return tensor.detach().contiguous()


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A variant with the runner that serves it: its own, or the portable one."""

    variant: Variant
    plan: Plan
    runner: Runner
    lock: AbstractContextManager[Any] | None
    portable: bool

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.lock is None:
            return self.runner(inputs)
        with self.lock:
            return self.runner(inputs)

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> list[LayerTime]:
        with self.lock or nullcontext():
            return self.runner.layer_times(inputs)


class _Loader:
    """Opens an engine's variants, each by its backend or, where that cannot be, portably."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        program: Program,
        now: Here,
        backends_extra: Sequence[str],
    ) -> None:
        self._folder, self._manifest, self._program, self._now = folder, manifest, program, now
        self._table = _backend_table(tuple(backends_extra))
        self._portable: tuple[Runner, AbstractContextManager[Any]] | None = None

    def load_all(self, portable: bool | None) -> tuple[list[_Served], list[str]]:
        """All variants in their order, and one line per variant that runs portably."""
        served: list[_Served] = []
        why_not = []
        try:
            for variant in self._manifest.variants:
                reason = "asked for" if portable else ""
                if portable is None:
                    reason = self._misfit(variant)
                if not reason:
                    try:
                        served.append(self._own(variant))
                        continue
                    except Exception as error:  # a backend's library raises what it likes
                        reason = _one_line(error)
                why_not.append(f"{variant.plan.title}: {reason}")
                served.append(self._stand_in(variant))
        except BaseException:
            _release(None, served)
            raise
        return served, why_not

    def _misfit(self, variant: Variant) -> str:
        backend = self._table.get(variant.plan.backend)
        packages = backend.spec.packages if backend else ()
        return misfit(self._manifest, variant, packages, self._now)

    def _own(self, variant: Variant) -> _Served:
        backend = self._table.get(variant.plan.backend)
        if backend is None:
            raise MissingBackendError(f"backend {variant.plan.backend}", "")
        runner = backend.load(self._program, variant.plan, self._folder / variant.folder)
        lock = None if getattr(runner, "concurrent", False) else threading.Lock()
        return _Served(variant=variant, plan=variant.plan, runner=runner, lock=lock, portable=False)

    def _stand_in(self, variant: Variant) -> _Served:
        if self._portable is None:
            self._portable = (_PortableRunner(self._program), threading.Lock())
        runner, lock = self._portable
        return _Served(variant=variant, plan=PORTABLE_PLAN, runner=runner, lock=lock, portable=True)


class _PortableRunner:
    """The program in eager fp32 on the CPU: what every machine with torch can run."""

    def __init__(self, program: Program) -> None:
        self._program = program
        exported = program.meta.exported
        self._module: nn.Module = program.exported_module() if exported else program.source_module()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._program.call(self._module, [tensor.cpu() for tensor in inputs])

    def layer_times(self, inputs: Sequence[torch.Tensor]) -> list[LayerTime]:
        return []

    def close(self) -> None:
        self._module = nn.Identity()


def _key(inputs: Sequence[Any]) -> _Key:
    return tuple([(tensor.dtype, tensor.shape) for tensor in inputs])


def _release(folder: Path | None, served: Sequence[_Served]) -> None:
    for runner in {id(one.runner): one.runner for one in served}.values():
        try:
            runner.close()
        except Exception as error:  # one backend's failure must not keep the others' memory
            _log.warning("closing a runner failed: %s", _one_line(error))
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _backend_table(extra: tuple[str, ...]) -> dict[str, Backend]:
    from suanli.engines.backends import backends

    return backends(extra)


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]
