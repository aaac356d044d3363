"""Training steps that can be profiled: recipes, runs, a loader or a step of a person's own."""

import copy
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.plan import Plan
from suanli.base.train_plan import TrainPlan
from suanli.measure.capturing.built import note_paths, settings_line, with_line_of
from suanli.measure.capturing.places import defining_line
from suanli.parallel.replicas import Replicas
from suanli.profiling import processes
from suanli.profiling.own_step import OwnStep
from suanli.profiling.stopwatch import Mark
from suanli.profiling.subjects import Example, Subject
from suanli.profiling.wrappers import taken_out
from suanli.training.batches import Batches
from suanli.training.checks import check_samples
from suanli.training.fit import default_plan
from suanli.training.forward import machine_as_planned
from suanli.training.kernels import usable
from suanli.training.recipe import Recipe, Tensors
from suanli.training.recipes import resolve_recipe
from suanli.training.run_folder import RunFolder
from suanli.training.start import held_out_end, starting_point, take_weights, train_some
from suanli.training.step import Stepper
from suanli.workloads.record import Data, Samples, TrainingSettings, Workload

# Optimisers that the count of the work has a formula for; another one is counted as the nearest.
_COUNTED = {"sgd": "sgd", "adam": "adam", "adamw": "adamw"}
_RATE = 1e-6  # of a workload that has no settings: a profile must not make its weights worthless


def training(recipe: Recipe, plan: TrainPlan | None, *, device: str, seed: int = 0) -> Subject:
    """A recipe's training step, as `suanli train` runs it.

    Args:
        recipe: What is trained; its settings say the batch.
        plan: How; None is the default plan of `suanli train`.
        device: Of the default plan.
        seed: Of weights and data order.

    Raises:
        BadInputError: There is nothing to train with, or the plan does not fit the model.
    """
    train, _ = held_out_end(recipe.workload.load().train, recipe.settings.validation_split)
    model = starting_point(recipe, train, seed)
    train = check_samples(model, recipe, train)
    if plan is None:
        plan = default_plan(recipe, device, train)
    if len(train) < recipe.settings.batch:
        recipe = with_batch(recipe, len(train))
    return _stepping(model, recipe, plan, train, seed)


def with_batch(recipe: Recipe, batch: int) -> Recipe:
    """The recipe with so many samples in a batch."""
    settings = replace(recipe.settings, batch=batch)
    return replace(recipe, settings=with_line_of(settings, recipe.settings))


def _stepping(
    model: nn.Module, recipe: Recipe, plan: TrainPlan, train: Samples, seed: int
) -> Subject:
    size = recipe.settings.batch
    joined = not processes.several()  # else the group is the caller's, who goes on with it
    replicas = Replicas.from_environment(plan.device)
    plan = plan.with_(device=replicas.device)
    if plan.sharded and replicas.world > 1:
        raise BadInputError(
            "a step that is sharded cannot be looked into", next_step="set sharded = false"
        )
    note_paths(model)
    plain = copy.deepcopy(model)
    stepper = Stepper(model, recipe, plan, replicas)
    batches = Batches(train, recipe, plan, seed)

    def next_batch() -> tuple[Tensors, torch.Tensor]:
        batch = batches.next()
        while len(batch) < size:  # the end of an epoch is no usual step
            batch = batches.next()
        return batch.inputs, batch.labels

    started = time.perf_counter()
    next_batch()
    first_ms = 1e3 * (time.perf_counter() - started)
    started = time.perf_counter()
    seen, _ = next_batch()
    usual_ms = 1e3 * (time.perf_counter() - started)
    few = train.head(size)
    assert few.labels is not None
    mine = range(size)[replicas.share(size)]  # what this process computes of a batch
    laid = (_laid_out_as(part, batch) for part, batch in zip(few.inputs, seen, strict=True))
    example = tuple(part[: len(mine)] for part in laid), few.labels[: len(mine)]
    found = _trained(recipe, stepper, plan, next_batch)
    found.model = plain
    found.batch = size
    found.example = _example(recipe, *example)

    def close() -> None:
        batches.close()
        if joined:
            replicas.close()

    found.close = close
    found.update_line = defining_line(recipe.optimizer) or settings_line(
        recipe.settings, recipe.workload.training
    )
    if recipe.arrange is not None:
        once = first_ms - usual_ms
        found.notes.append(
            f"an epoch's data is arranged once, before its steps: {once:.0f} ms, which is "
            f"{once / batches.per_epoch:.3g} ms a step and not in the figures"
        )
    return found


def _laid_out_as(part: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Samples with the strides of a batch: of one channel, these decide what layers lie like."""
    alike = part.shape == batch.shape and part.stride() != batch.stride()
    if not alike or 0 in batch.stride():  # what is expanded cannot be written to
        return part
    return torch.empty_strided(part.shape, batch.stride(), dtype=part.dtype).copy_(part)


def _trained(
    recipe: Recipe,
    stepper: Stepper,
    plan: TrainPlan,
    next_batch: Callable[[], tuple[Tensors, torch.Tensor]],
) -> Subject:
    """A step through the same `Stepper` that training uses."""

    def step(mark: Mark) -> None:
        mark("data")
        inputs, labels = next_batch()
        stepper.forward.on_phase = mark
        mark("forward")
        loss = stepper.gradients(inputs, labels)
        if plan.kind == "cpu":
            float(loss)  # the loop looks whether it is finite
        stepper.update(0.0)

    inner = stepper.forward.call
    return Subject(
        name=recipe.name,
        kind="workload",
        training=True,
        batch=recipe.settings.batch,
        plan=plan,
        step=step,
        first="data",
        watched=(inner,) if isinstance(inner, nn.Module) else (stepper.model,),
        compiled=plan.compile != "none",
        conditions=lambda: machine_as_planned(plan),
        stepper=stepper,
    )


def _example(recipe: Recipe, inputs: Tensors, labels: torch.Tensor) -> Example:
    settings = recipe.settings
    momentum = settings.optimizer == "sgd" and settings.momentum > 0
    optimizer = _COUNTED.get(settings.optimizer, "sgd-momentum")
    return Example(
        args=inputs,
        loss=recipe.workload.loss,
        targets=labels,
        optimizer="sgd-momentum" if momentum else optimizer,
        decay=settings.weight_decay > 0,
    )


def of_run(
    folder: Path, plan: TrainPlan | None, batch: int | None = None, device: str = ""
) -> Subject:
    """The training step of a run: its workload, its settings, its plan, its weights so far.

    Args:
        folder: What `suanli train` wrote.
        plan: In the place of its own.
        batch: In the place of its own.
        device: In the place of that of its own plan; "" is that one.

    Raises:
        BadInputError: There is no run, or it cannot be made again from what it says.
    """
    run = RunFolder(folder)
    record, own = run.read()
    if not record.ref:
        raise BadInputError(
            f"{folder} is a run of a model that lived in one process only",
            next_step="give the model to suanli.profile(model, loader, loss)",
        )
    settings = replace(record.settings, batch=batch or record.settings.batch)
    recipe = resolve_recipe(record.ref)
    recipe = replace(recipe, settings=with_line_of(settings, recipe.settings))
    if device:
        own = usable(own.with_(device=device))
    found = training(recipe, plan or own, device=own.device, seed=record.seed)
    found.kind = "run"
    if run.weights.is_file() and found.stepper is not None:
        take_weights(found.stepper.model, run.weights)
    return found


def synthetic(workload: Workload, plan: TrainPlan, batch: int) -> Subject:
    """A training step of a workload without data: example inputs again and again.

    Its own loss is taken where it has one and takes class labels, else the sum of the output.

    Raises:
        BadInputError: The model takes other than positional tensors.
    """
    given = workload.make_inputs(batch)
    inputs = tuple(given.args)
    if given.kwargs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise BadInputError(
            f"{workload.name} has no data and takes other than positional tensors",
            next_step="profile it from Python, with a loader of its own",
        )
    labels = torch.zeros(batch, dtype=torch.int64)
    settings = workload.training or TrainingSettings(lr=_RATE, momentum=0.9)
    samples = Samples(inputs=inputs, labels=labels)
    data = Data(train=samples, search=samples, acceptance=samples)
    ready = replace(workload, data=lambda: data, loss=workload.loss or _sum)
    recipe = Recipe(workload=ready, settings=replace(settings, batch=batch), ref=workload.ref)
    model = train_some(copy.deepcopy(workload.make_model()))  # it may be the user's own
    found = _stepping(model, recipe, plan, samples, 0)
    found.notes.append("the workload has no data: example inputs, and labels of one class")
    return found


def _sum(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return output.sum()


def of_loader(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[..., torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer | None,
    plan: TrainPlan,
) -> Subject:
    """Training steps on batches from a person's own loader.

    Args:
        model: A copy of it is trained; with `optimizer` the model itself, which is put back.
        loader: Gives (input, …, labels), again and again.
        loss: `loss(output, labels)`.
        optimizer: Of the model's parameters; SGD where there is none.
        plan: How the step is computed; the loader is used as it is.

    Raises:
        BadInputError: The loader is empty, gives something else, or gives its batches only once.
    """
    if not isinstance(loader, Iterable):
        raise BadInputError(f"a loader gives batches, a {type(loader).__name__} does not")
    first_inputs, first_labels = _batch_of(next(iter(loader), None))
    size = int(first_labels.shape[0]) if first_labels.dim() else 0
    if not size:
        raise BadInputError("the loader's first batch holds no samples")
    source = _again(loader)
    workload = Workload(
        name=type(model).__name__, make_model=lambda: model, make_inputs=_unused, loss=loss
    )
    recipe = Recipe(
        workload=workload,
        settings=_settings_of(optimizer, size),
        optimizer=None if optimizer is None else lambda *_: optimizer,
    )
    plain = copy.deepcopy(model)
    states = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    trained = copy.deepcopy(model) if optimizer is None else model
    if optimizer is None:
        note_paths(trained)
    stepper = Stepper(trained, recipe, plan)

    def next_batch() -> tuple[Tensors, torch.Tensor]:
        inputs, labels = _batch_of(next(source))
        while int(labels.shape[0]) < size:
            inputs, labels = _batch_of(next(source))
        return tuple(_brought(x, plan) for x in inputs), labels.to(plan.device)

    found = _trained(recipe, stepper, plan, next_batch)
    found.model = plain
    found.example = _example(recipe, first_inputs, first_labels)
    found.own_loader = True

    def put_back() -> None:
        source.close()  # a DataLoader's processes end with its iterator
        if optimizer is not None and states is not None:
            model.load_state_dict(plain.state_dict())
            model.train(plain.training)
            optimizer.load_state_dict(states)

    found.close = put_back
    return found


def _settings_of(optimizer: torch.optim.Optimizer | None, batch: int) -> TrainingSettings:
    """What is counted of an update: that of a person's own optimiser where there is a formula."""
    plain = TrainingSettings(batch=batch, lr=_RATE, momentum=0.9)
    name = type(optimizer).__name__.lower()
    if optimizer is None or name not in _COUNTED:
        return plain
    given = optimizer.defaults
    return replace(
        plain,
        optimizer=_COUNTED[name],
        momentum=float(given.get("momentum", 0.0)),
        weight_decay=float(given.get("weight_decay", 0.0)),
    )


def _unused(batch: int) -> Any:
    raise BadInputError("a model with a loader has no example inputs")


def _again(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Batches without end.

    Raises:
        BadInputError: A pass over the loader gives none: it is a generator that has run out.
    """
    while True:
        any_came = False
        for batch in loader:
            any_came = True
            yield batch
        if not any_came:
            raise BadInputError(
                "the loader gives its batches only once",
                next_step="give a DataLoader, or a list of batches",
            )


def _batch_of(given: Any) -> tuple[Tensors, torch.Tensor]:
    """Inputs and labels of what a loader gave.

    Raises:
        BadInputError: It is no sequence of at least two tensors.
    """
    parts = tuple(given) if isinstance(given, list | tuple) else ()
    if len(parts) < 2 or not all(isinstance(part, torch.Tensor) for part in parts):
        kind = "nothing" if given is None else f"a {type(given).__name__}"
        raise BadInputError(
            f"the loader gives {kind}, and not (input, …, labels)",
            next_step="give a DataLoader, or any iterable of tuples of tensors",
        )
    return parts[:-1], parts[-1]


def _brought(part: torch.Tensor, plan: TrainPlan) -> torch.Tensor:
    moved = part.to(plan.device)
    if part.dim() == 4 and plan.memory_layout == "channels_last":
        return moved.contiguous(memory_format=torch.channels_last)
    return moved


def of_step(
    step: Callable[[], object],
    *,
    model: nn.Module | None,
    batch: int,
    device: str,
) -> Subject:
    """A step of a person's own, as a function without arguments.

    What it does before the model's first call counts as data; where backward and update begin is
    seen from the outside: at `Tensor.backward` and at the optimiser's `step`.

    Args:
        step: Runs one step.
        model: Whose module paths are to be shown.
        batch: Samples in it.
        device: "cpu" or "cuda:0".
    """
    trained = model is not None and model.training
    own = OwnStep(step, model)
    within = None if model is None else taken_out(model)
    plan: Plan | TrainPlan = Plan(backend="eager", precision="fp32", device=device)
    if trained:
        plan = TrainPlan(device=device)
    return Subject(
        name=getattr(step, "__name__", type(step).__name__),
        kind="workload",
        training=trained,
        batch=batch,
        plan=_compiled(plan) if within is not None and within.compiled else plan,
        step=own,
        first="data" if trained else "forward",
        model=None,
        watched=() if within is None else (within.module,),
        compiled=within is not None and within.compiled,
        conditions=nullcontext,
        own=own,
    )


def _compiled(plan: Plan | TrainPlan) -> Plan | TrainPlan:
    if isinstance(plan, Plan):
        return plan.with_(backend="inductor")
    return plan.with_(compile="default")
