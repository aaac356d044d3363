"""Layer 7: the verb `suanli profile` in Python."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.events import Event, Listener, ignore
from suanli.base.profile_results import ProfileResult

if TYPE_CHECKING:
    import torch
    from torch import nn

    from suanli.base.hardware import Ceilings
    from suanli.base.plan import Plan
    from suanli.base.train_plan import TrainPlan
    from suanli.engines.engine import Engine
    from suanli.profiling.checking import Remake
    from suanli.profiling.subjects import Subject
    from suanli.training.recipe import Recipe
    from suanli.workloads.record import Workload


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What a person may ask of `profile`.

    Attributes:
        train: Profile a training step; None is yes for runs, recipes, and where there is a loader.
        batch: Samples in a step; None takes as many as the example inputs hold, the workload's own
            for training, the engine's for an engine, 1 for other inference.
        plan: How the step is computed: a plan or its file; None is eager fp32 for inference and
            what `suanli train` takes by default for training.
        steps: Steps to time.
        check: How many pieces of advice to try.
        check_seconds: Time for the race of each, but for a few steps of both sides.
        device: "cpu", "cuda:0", … or "auto", which takes the first GPU where there is one.
        trace: File to write the timeline to, for Perfetto and Chrome.
        trust: Open an engine although nobody whose key is trusted here made it.
    """

    train: bool | None = None
    batch: int | None = None
    plan: "Plan | TrainPlan | Path | None" = None
    steps: int = 30
    check: int = 0
    check_seconds: float = 12.0
    device: str = "auto"
    trace: Path | None = None
    trust: bool = False

    def checked(self) -> "ProfileOptions":
        """These options, a file that is named by a text as a path.

        Raises:
            BadInputError: One of them makes no sense; the message names it.
        """
        if self.batch is not None and not 1 <= self.batch <= 65536:
            raise BadInputError(f"--batch must be from 1 to 65536, not {self.batch}")
        if not 3 <= self.steps <= 10_000:
            raise BadInputError(f"--steps must be from 3 to 10000, not {self.steps}")
        if not 0 <= self.check <= 20:
            raise BadInputError(f"--check must be from 0 to 20, not {self.check}")
        if not 0 < self.check_seconds <= 3600:
            raise BadInputError(f"check_seconds must be above 0, not {self.check_seconds}")
        if self.trace is None:
            return self
        trace = Path(self.trace)
        if not trace.absolute().parent.is_dir():
            raise BadInputError(f"--trace: there is no folder {trace.absolute().parent}")
        return replace(self, trace=trace)


def profile(
    what: "str | Path | nn.Module | Workload | Recipe | Engine | Callable[[], object]",
    data: Any = None,
    loss: "Callable[..., torch.Tensor] | None" = None,
    *,
    optimizer: "torch.optim.Optimizer | None" = None,
    model: "nn.Module | None" = None,
    on_event: Listener = ignore,
    **fields: Any,
) -> ProfileResult:
    """Say where a step's time goes against the machine's limit, and what to change first.

    Args:
        what: A reference, an engine's or a run's folder, an engine, a `Workload`, a `Recipe`, an
            `nn.Module`, or a function that runs one step of a loop of your own.
        data: For a module: example inputs; or, with a loss, a loader of (input, …, labels). For a
            reference: the folder of its data.
        loss: `loss(output, labels)`: the module's training step is profiled.
        optimizer: Of the module's parameters; SGD without one.
        model: For a step of your own: the module whose paths operators are shown with.
        on_event: Told what is going on.
        **fields: Fields of `ProfileOptions`.

    Raises:
        BadInputError: It cannot be profiled, or an option makes no sense.
        SuanliError: The plan cannot be built here.
    """
    from suanli.base.processes import rank
    from suanli.measure.capturing.built import lines_noted
    from suanli.measure.capturing.places import line_at
    from suanli.profiling.processes import first_before_others
    from suanli.profiling.verb import Profiler

    options = ProfileOptions(**fields).checked()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="suanli-profile-")))
        maker = _Maker(what, data, loss, optimizer, model, options, stack)
        on_event(Event(kind="step", text=f"making {maker.name}"))
        with lines_noted():
            subject = maker.make(maker.plan(), options.batch, scratch)
        subject.called_from = line_at(sys._getframe(1))
        stack.callback(subject.close)
        together = subject.stepper is not None and subject.stepper.replicas.world > 1

        def limits() -> "Ceilings | None":
            return _ceilings(subject.device, on_event)

        profiler = Profiler(
            steps=options.steps,
            checks=options.check,
            check_seconds=options.check_seconds,
            ceilings=first_before_others(limits) if together else limits(),
            compiler=_compiler(),
            remake=maker.remake,
            listener=on_event,
        )
        result = profiler.run(subject)
    if options.trace is not None and not (together and rank()):
        from suanli.profiling.trace import write_chrome

        write_chrome(result, options.trace)
    return result


class _Maker:
    """Makes the step that was asked for, and makes it again under other plans."""

    def __init__(
        self,
        what: Any,
        data: Any,
        loss: "Callable[..., torch.Tensor] | None",
        optimizer: "torch.optim.Optimizer | None",
        model: "nn.Module | None",
        options: ProfileOptions,
        stack: ExitStack,
    ) -> None:
        self._what, self._data, self._loss = what, data, loss
        self._optimizer, self._model, self._options = optimizer, model, options
        self._stack = stack
        self._device = _device(options.device)
        self._folder = Path(data) if isinstance(data, str | Path) else None
        self.name = str(what) if isinstance(what, str | Path) else type(what).__name__

    @property
    def remake(self) -> "Remake | None":
        """How to make the step again; None for what exists once."""
        from suanli.base.processes import world

        if self._is_step() or self._engine_folder() is not None or self._optimizer is not None:
            return None
        if world() > 1:  # a race takes as many steps as time allows, which differs by process
            return None
        return self.make

    def plan(self) -> "Plan | TrainPlan | None":
        """The plan that was asked for; None without one.

        Raises:
            BadInputError: The file is no plan.
        """
        given = self._options.plan
        return _read_plan(given) if isinstance(given, str | Path) else given

    def make(self, plan: "Plan | TrainPlan | None", batch: int | None, scratch: Path) -> "Subject":
        """The step under a plan.

        Raises:
            BadInputError: It cannot be made.
        """
        from torch import nn

        from suanli.engines.engine import Engine
        from suanli.profiling import subjects, training_subjects

        folder = self._engine_folder()
        if isinstance(self._what, Engine):
            return subjects.of_engine(self._what, batch)
        if folder is not None:
            self._no_plan(plan, "an engine")
            self._only("an engine answers", train=False)
            self._no_data("an engine")
            engine = self._stack.enter_context(Engine.load(folder, trust=self._options.trust))
            return subjects.of_engine(engine, batch)
        if self._run_folder() is not None:
            self._only("a run trains", train=True)
            self._no_data("a run")
            device = self._device if self._options.device != "auto" else ""
            return training_subjects.of_run(Path(self._what), _train_plan(plan), batch, device)
        if self._is_step():
            self._no_plan(plan, "a step of your own")
            return training_subjects.of_step(
                self._what, model=self._model, batch=batch or 1, device=self._device
            )
        if isinstance(self._what, nn.Module):
            return self._of_module(self._what, plan, batch, scratch)
        return self._of_workload(plan, batch, scratch)

    def _of_module(
        self,
        model: "nn.Module",
        plan: "Plan | TrainPlan | None",
        batch: int | None,
        scratch: Path,
    ) -> "Subject":
        """A module's step, without what stands around the module; a compiled one compiled."""
        from suanli.profiling import training_subjects
        from suanli.profiling.processes import check_alone
        from suanli.profiling.wrappers import taken_out

        within = taken_out(model)
        if self._loss is None:
            if self._data is None:
                raise BadInputError(
                    "profile(model, inputs) needs example inputs",
                    next_step="a tensor, a tuple of arguments or a dictionary; or, with a loss, "
                    "a loader",
                )
            size = batch or _samples(self._data)
            found = self._of_workload(plan, size, scratch, compiled=within.compiled)
        else:
            self._only("a model with a loss trains", train=True)
            check_alone("training with a loader")
            if self._options.batch is not None:
                raise BadInputError("the loader says how large a batch is, leave `batch` out")
            plain = _plain(self._device, compiled=within.compiled)
            found = training_subjects.of_loader(
                within.module,
                self._data,
                self._loss,
                optimizer=self._optimizer,
                plan=_train_plan(plan) or plain,
            )
        found.notes += within.notes
        return found

    def _of_workload(
        self,
        plan: "Plan | TrainPlan | None",
        batch: int | None,
        scratch: Path,
        *,
        compiled: bool = False,
    ) -> "Subject":
        from suanli.base.train_plan import TrainPlan
        from suanli.profiling import subjects, training_subjects

        training = self._options.train
        if training is None:
            training = isinstance(plan, TrainPlan) or self._is_recipe()
        if not training:
            usual = subjects.EAGER.with_(device=self._device)
            if compiled:
                usual = usual.with_(backend="inductor")
            return subjects.inference(self._workload(), _plan(plan) or usual, batch or 1, scratch)
        recipe = self._recipe()
        if recipe is None:
            plain = _plain(self._device, compiled=compiled)
            chosen = _train_plan(plan) or plain
            return training_subjects.synthetic(self._workload(), chosen, batch or 32)
        if batch is not None:
            recipe = training_subjects.with_batch(recipe, batch)
        return training_subjects.training(recipe, _train_plan(plan), device=self._device)

    def _workload(self) -> "Workload":
        from torch import nn

        from suanli.training.recipe import Recipe
        from suanli.training.recipes import resolve_recipe
        from suanli.workloads.module import of_module
        from suanli.workloads.record import Workload
        from suanli.workloads.resolve import resolve

        if isinstance(self._what, str):
            if self._is_recipe():
                return resolve_recipe(self._what, data=self._folder).workload
            return resolve(self._what, data=self._folder)
        if isinstance(self._what, Recipe):
            return self._what.workload
        if isinstance(self._what, nn.Module):
            return of_module(self._what, self._data)
        if not isinstance(self._what, Workload):
            raise BadInputError(
                f"a {type(self._what).__name__} cannot be profiled",
                next_step="give a model, a workload, a recipe, an engine, a folder or a function",
            )
        return self._what

    def _recipe(self) -> "Recipe | None":
        """What is trained; None for a workload without data of its own."""
        from suanli.training.recipe import Recipe, as_written
        from suanli.training.recipes import resolve_recipe

        if isinstance(self._what, Recipe):
            return self._what
        if isinstance(self._what, str):
            try:
                return resolve_recipe(self._what, data=self._folder)
            except BadInputError:
                workload = self._workload()
                if workload.data is not None and workload.training is not None:
                    raise
                return None
        workload = self._workload()
        if workload.data is None or workload.training is None or workload.loss is None:
            return None
        return as_written(workload)

    def _is_recipe(self) -> bool:
        from suanli.training.recipe import Recipe
        from suanli.training.recipes import RECIPES

        named = isinstance(self._what, str) and self._what in RECIPES
        return isinstance(self._what, Recipe) or named

    def _is_step(self) -> bool:
        from torch import nn

        from suanli.engines.engine import Engine

        plain = isinstance(self._what, nn.Module | Engine | str | Path)
        return not plain and callable(self._what)

    def _engine_folder(self) -> Path | None:
        return self._folder_with("manifest.json")

    def _run_folder(self) -> Path | None:
        return self._folder_with("run.json")

    def _folder_with(self, name: str) -> Path | None:
        if not isinstance(self._what, str | Path):
            return None
        folder = Path(self._what)
        return folder if (folder / name).is_file() else None

    def _only(self, what: str, *, train: bool) -> None:
        if self._options.train not in (None, train):
            option = "--infer" if train else "--train"
            raise BadInputError(f"{what}: {option} makes no sense", next_step=f"leave {option} out")

    def _no_data(self, what: str) -> None:
        if self._folder is not None:
            raise BadInputError(f"{what} knows its data", next_step="leave --data out")

    def _no_plan(self, plan: object, what: str) -> None:
        if self._options.plan is not None and plan is not None:
            raise BadInputError(f"{what} has its plan already", next_step="leave --plan out")


def _samples(inputs: Any) -> int | None:
    """How many samples example inputs hold; None where their tensors do not agree on it."""
    import torch
    from torch.utils import _pytree as pytree

    given = getattr(inputs, "args", inputs), dict(getattr(inputs, "kwargs", {}))
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor) and x.dim()]
    sizes = {int(leaf.shape[0]) for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 and sizes != {0} else None


def _read_plan(path: "str | Path") -> "Plan | TrainPlan":
    import json

    from suanli.base import codec
    from suanli.base.plan import Plan
    from suanli.base.train_plan import TrainPlan

    file = Path(path)
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"--plan: {file} is no plan's file: {error}") from None
    if isinstance(given, dict) and "backend" in given:
        return codec.from_json(Plan, given)
    return codec.from_json(TrainPlan, given).checked()


def _plan(plan: "Plan | TrainPlan | None") -> "Plan | None":
    from suanli.base.plan import Plan

    if plan is not None and not isinstance(plan, Plan):
        raise BadInputError("this is a plan of training", next_step="add --train")
    return plan


def _train_plan(plan: "Plan | TrainPlan | None") -> "TrainPlan | None":
    from suanli.base.train_plan import TrainPlan

    if plan is not None and not isinstance(plan, TrainPlan):
        raise BadInputError("this is a plan of inference", next_step="give --infer")
    return plan


def _plain(device: str, *, compiled: bool) -> "TrainPlan":
    """What a plain PyTorch loop does."""
    from suanli.base.train_plan import TrainPlan

    return TrainPlan(device=device, compile="default" if compiled else "none")


def _device(wanted: str) -> str:
    from suanli.devices import device

    if wanted == "auto":
        import torch

        return "cuda:0" if torch.cuda.is_available() else "cpu"
    device(wanted)
    return wanted


def _ceilings(device: str, on_event: Listener) -> "Ceilings | None":
    """The device's ceilings, measured now where they are not known."""
    from suanli.measure.ceilings import ceilings

    def say(text: str) -> None:
        on_event(Event(kind="step", text=f"measuring {device}, up to 25 s: {text}"))

    try:
        return ceilings(device, progress=say)
    except SuanliError as error:
        on_event(Event(kind="note", text=f"no ceilings: {error}"))
        return None


def _compiler() -> bool:
    """Whether torch.compile can make code for this machine."""
    from suanli.base.compiler import find_compiler

    return find_compiler() is not None
