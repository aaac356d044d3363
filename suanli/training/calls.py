"""The verb `train`, for a workload by name and for a module of the caller's own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.events import Event, Listener, ignore
from suanli.base.events_log import EventsLog
from suanli.base.files import beside
from suanli.base.processes import rank, world
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainResult
from suanli.devices import device as find_device
from suanli.training.checks import checked_settings
from suanli.training.distill import Taught, distilled
from suanli.training.own_folder import own_folder
from suanli.training.prune import pruned
from suanli.training.recipe import Recipe, as_written
from suanli.training.recipes import resolve_recipe
from suanli.training.request import TrainRequest
from suanli.training.run_folder import Keeping, RunFolder, RunRecord
from suanli.training.schedules import factors
from suanli.training.trainer import Trainer
from suanli.training.tune import said, tune
from suanli.training.twin import copy_of
from suanli.workloads.given import as_data
from suanli.workloads.record import Inputs, TrainingSettings, Workload
from suanli.workloads.resolve import resolve
from suanli.workloads.stream import own_generators


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a person may ask of `train`.

    Attributes:
        plan: "auto" searches, "default" takes what is fast nearly everywhere, else a file of a plan
            or the plan itself.
        epochs: Instead of the workload's own.
        to: Quality at which to stop; above 1 it is a percentage, but for a loss.
        max_seconds: Of training; a schedule is shortened to it.
        resume: Go on with the run in `out`.
        start: Weights to start from (safetensors, or a run's folder).
        freeze: Shell patterns of parameter names that are not trained.
        lr_of: Shell pattern -> factor of the rate of the parameters that match it, or texts such as
            "head.*=10".
        seed: Of weights, data order and augmentation.
        device: "cpu", "cuda:0", … or "auto", which times a step of small work on the CPU and on
            the first GPU, and gives work that is not small to the GPU.
        out: The run's folder; by default `runs/NAME`, numbered where that is taken.
        on_nan: "stop", or "rollback" to the last checkpoint with half the rate.
        budget_s: Seconds for the search; by default a quarter of the run and no more than 120 s or,
            where that is longer, a twentieth of it.
        checkpoint_s: Seconds between two checkpoints.
        keep: How many checkpoints stay.
        backup: A second folder for copies of them.
        key: File of the key that encrypts them; made where there is none.
        fresh: Whether to forget trials of earlier searches.
        prune: "2:4" or a fraction of the weights to drop and keep at zero; "" for none.
        teacher: A workload with trained weights to learn from as well; "" for none.
        tune: Trials of the hyper-parameters before the run; 0 for none.
        sharded: Of several processes each keeps its share of the model only.
    """

    plan: "str | Path | TrainPlan" = "auto"
    epochs: int | None = None
    to: float | None = None
    max_seconds: float | None = None
    resume: bool = False
    start: Path | None = None
    freeze: tuple[str, ...] = ()
    lr_of: "Mapping[str, float] | Sequence[str]" = ()
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    on_nan: str = "stop"
    budget_s: float | None = None
    checkpoint_s: float = 60.0
    keep: int = 2
    backup: Path | None = None
    key: Path | None = None
    fresh: bool = False
    prune: str = ""
    teacher: str = ""
    tune: int = 0
    sharded: bool = False

    def checked(self) -> "TrainOptions":
        """These options, texts that name a file or folder as paths.

        Raises:
            BadInputError: One of them makes no sense; the message names it.
        """
        if not isinstance(self.plan, str | Path | TrainPlan):
            raise BadInputError(
                f"a plan cannot be a {type(self.plan).__name__}",
                next_step="auto, default, a file of a plan, or a TrainPlan",
            )
        if self.epochs is not None and self.epochs < 1:
            raise BadInputError(f"--epochs must be at least 1, not {self.epochs}")
        for name, value in (("--max-seconds", self.max_seconds), ("--budget", self.budget_s)):
            if value is not None and not 0 < value < math.inf:
                raise BadInputError(f"{name} must be more than 0 seconds, not {value:g}")
        if self.to is not None and not 0 < self.to <= 100:
            raise BadInputError(f"--to must be a fraction or a percentage, not {self.to:g}")
        if self.on_nan not in ("stop", "rollback"):
            raise BadInputError(f"--on-nan must be stop or rollback, not {self.on_nan!r}")
        if self.keep < 1 or not self.checkpoint_s > 0:
            raise BadInputError("at least one checkpoint is kept, and some time lies between two")
        if self.tune < 0:
            raise BadInputError(f"--tune must be a number of trials, not {self.tune}")
        if self.seed < 0:
            raise BadInputError(f"--seed must not be negative, not {self.seed}")
        if self.seed >= 1 << 62:  # others are counted on from it, and generators take 64 bits
            raise BadInputError(f"--seed must be below 2 to the 62nd, not {self.seed}")
        named = {name: getattr(self, name) for name in ("start", "out", "backup", "key")}
        paths: dict[str, Any] = {name: Path(value) for name, value in named.items() if value}
        return replace(self, **paths, lr_of=factors(self.lr_of))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What training gave.

    Attributes:
        model: Trained, in evaluation mode, fp32, on the CPU.
        result: The record that `--json` prints.
    """

    model: nn.Module
    result: TrainResult


def train_workload(
    ref: str,
    options: TrainOptions,
    *,
    data: Path | None = None,
    on_event: Listener = ignore,
) -> TrainResult:
    """Train what a name stands for.

    Args:
        ref: A recipe that ships, a workload with training settings, or `file.py:name` of one.
        options: What is asked.
        data: Folder of the data sets.
        on_event: Told what is going on.

    Raises:
        BadInputError: The workload cannot be trained, or an option makes no sense.
        NotFiniteError: The loss is no longer finite.
    """
    asked = options.checked()
    return _trained(resolve_recipe(ref, data=data), asked, data, on_event).result


@own_generators()  # from the first look at the data on: what is imported may draw as well
def _trained(recipe: Recipe, asked: TrainOptions, data: Path | None, listener: Listener) -> "Run":
    """Train a recipe in a folder that no other process trains in."""
    recipe = replace(recipe, settings=checked_settings(recipe.settings))
    with own_folder(asked.out, recipe.name, resume=asked.resume) as out:
        return _trained_in(out, recipe, asked, data, listener)


def _trained_in(
    out: Path, recipe: Recipe, asked: TrainOptions, data: Path | None, listener: Listener
) -> "Run":
    """Train a recipe with what the options add to it."""
    notes: tuple[str, ...] = ()
    if asked.resume:
        record, plan = RunFolder(out, Keeping(backup=asked.backup)).read()
        notes = _without_effect(asked, record, plan)
        asked = replace(asked, prune=record.prune, teacher=record.teacher)
    elif asked.lr_of:
        settings = replace(recipe.settings, lr_of=tuple(asked.lr_of))
        recipe = replace(recipe, settings=settings, changes=_and(recipe.changes, "own rates"))
    if asked.teacher:
        recipe = distilled(recipe, resolve(asked.teacher, data=data))
    if asked.prune:
        recipe = pruned(recipe, asked.prune)
    request = replace(_request(asked, out), notes=notes)
    if asked.tune and not asked.resume:
        recipe, line = _tuned(recipe, request, asked.tune, listener)
        request = replace(request, notes=(*notes, line))
    return _followed(recipe, request, listener)


def _and(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _without_effect(asked: TrainOptions, record: RunRecord, plan: TrainPlan) -> tuple[str, ...]:
    """What was asked of a run that goes on, and is not as it was begun, in lines."""
    start = str(asked.start.resolve()) if asked.start else ""
    pairs: dict[str, tuple[Any, Any, Any]] = {  # as asked, as begun, as nobody asked
        "--seed": (asked.seed, record.seed, TrainOptions.seed),
        "--from": (start, record.start, ""),
        "--freeze": (asked.freeze, record.frozen, ()),
        "--lr-of": (tuple(asked.lr_of), record.settings.lr_of, ()),
        "--prune": (asked.prune, record.prune, ""),
        "--teacher": (asked.teacher, record.teacher, ""),
        "--device": (asked.device, plan.device, TrainOptions.device),
        "--sharded": (asked.sharded, plan.sharded, False),
        "--tune": (asked.tune, 0, 0),
        "--budget": (asked.budget_s, None, None),
        "--fresh": (asked.fresh, False, False),
    }
    found = [name for name, (own, begun, none) in pairs.items() if own not in (begun, none)]
    if not found:
        return ()
    return (f"the run goes on as it was begun, so {', '.join(found)} changes nothing",)


def _followed(recipe: Recipe, request: TrainRequest, listener: Listener) -> "Run":
    """Train, with the events kept beside the run's folder for those who look on."""
    first = rank() == 0  # of the processes that torchrun started
    out = request.out if first else None
    begun = RunFolder(request.out).exists  # also where torchrun has started the processes again
    with EventsLog(
        out,
        verb="train",
        workload=recipe.name,
        listener=listener,
        append=request.resume or begun,
        held=True,
    ) as told:
        try:
            result, model = Trainer(recipe, request, told, told.release).run()
        except BaseException:
            if not RunFolder(request.out).exists:
                told.discard()  # the run never began
            raise
        told.finish(result)
    return Run(model=model.student if isinstance(model, Taught) else model, result=result)


def _tuned(
    recipe: Recipe, request: TrainRequest, trials: int, on_event: Listener
) -> tuple[Recipe, str]:
    """The recipe with the best of so many settings, and a line that says them.

    The study lies beside the run's folder.
    """
    if request.epochs is not None:
        recipe = replace(recipe, settings=replace(recipe.settings, epochs=request.epochs))
    study = beside(request.out, "-tune") / "study.db"
    try:
        found = tune(
            recipe, trials, study, seed=request.seed, device=request.device, listener=on_event
        )
    except KeyboardInterrupt:
        if study.exists():
            text = f"the trials so far are in {study}: the same command goes on with them"
            on_event(Event(kind="note", text=text))
        raise
    before = "" if found.as_written is None else f", {found.as_written:.4g} as written"
    words = ", ".join(f"{name} {said(value)}" for name, value in found.values.items())
    line = f"{found.trials} settings tried, the best: {words} (quality {found.quality:.4g}{before})"
    return found.recipe, line


def train_module(
    model: "nn.Module | Workload | Recipe",
    data: Any = None,
    loss: Callable[..., torch.Tensor] | None = None,
    *,
    on_event: Listener = ignore,
    **options: Any,
) -> Run:
    """Train a module of the caller's own, in place. See `suanli.api.train`."""
    own = {field.name for field in fields(TrainOptions)}
    asked = TrainOptions(**{k: v for k, v in options.items() if k in own}).checked()
    rest = {k: v for k, v in options.items() if k not in own}
    if isinstance(model, Recipe | Workload):
        if rest:
            raise BadInputError(f"{next(iter(rest))!r} is no option of train")
        recipe = model if isinstance(model, Recipe) else as_written(model)
    else:
        recipe = _recipe_of(model, data, loss, rest, asked)
    run = _trained(recipe, asked, None, on_event)
    if isinstance(model, nn.Module):
        model.load_state_dict(run.model.state_dict())
        run = replace(run, model=model.eval())
    return run


def _recipe_of(
    model: nn.Module,
    data: Any,
    loss: Callable[..., torch.Tensor] | None,
    settings: dict[str, Any],
    asked: TrainOptions,
) -> Recipe:
    if loss is None or data is None:
        raise BadInputError(
            "train(model, data, loss) needs data and a loss",
            next_step="data=(inputs, labels) or a Dataset, loss=torch.nn.functional.cross_entropy",
        )
    known = {field.name for field in fields(TrainingSettings)}
    if unknown := sorted(set(settings) - known):
        raise BadInputError(
            f"{unknown[0]!r} is no option of train",
            next_step=f"there are {', '.join(sorted(known))}",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInputError("no parameter of the model is trained")
    if asked.epochs is not None:
        settings["epochs"] = asked.epochs
    parts = as_data(data)
    if isinstance(data, DataLoader) and data.batch_size is not None:
        settings.setdefault("batch", data.batch_size)
    start = copy_of(model).to("cpu")
    workload = Workload(
        name=type(model).__name__,
        make_model=lambda: copy_of(start),
        make_inputs=lambda batch: Inputs(args=parts.train.head(batch).inputs),
        data=lambda: parts,
        loss=loss,
        untrained=False,
        training=TrainingSettings(**settings),
    )
    return as_written(workload)


def _request(options: TrainOptions, out: Path) -> TrainRequest:
    plan: str | TrainPlan
    if isinstance(options.plan, TrainPlan) or options.plan in ("auto", "default"):
        plan = options.plan
    else:
        plan = codec.read(TrainPlan, Path(options.plan)).checked()
    device = _device(options)
    if isinstance(plan, TrainPlan) and options.device not in ("auto", plan.device):
        plan = replace(plan, device=device).checked()
    return TrainRequest(
        plan=plan,
        device=plan.device if isinstance(plan, TrainPlan) else device,
        out=out,
        seed=options.seed,
        epochs=options.epochs,
        max_seconds=options.max_seconds,
        to=options.to,
        resume=options.resume,
        start=options.start,
        frozen=options.freeze,
        on_nan=options.on_nan,
        budget_s=options.budget_s,
        fresh=options.fresh,
        prune=options.prune,
        teacher=options.teacher,
        sharded=options.sharded,
        keeping=Keeping(
            every_s=options.checkpoint_s,
            keep=options.keep,
            backup=options.backup,
            key=options.key,
        ),
    )


def _device(options: TrainOptions) -> str:
    """The device's name; "auto" stays where a step on both has to be timed."""
    if options.device != "auto":
        find_device(options.device)
        return options.device
    if not torch.cuda.is_available():
        return "cpu"
    several = world() > 1
    return "cuda:0" if several or options.tune or options.resume else "auto"
