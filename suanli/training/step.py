"""One training step: gradients of a batch, then the optimiser's update."""

from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.parallel.replicas import Agreed, Replicas
from suanli.parallel.sharded import gathered, shard
from suanli.training.forward import Forward
from suanli.training.native import update
from suanli.training.recipe import Averaging, Recipe, Tensors
from suanli.training.schedules import apart, rate
from suanli.training.sgd import SGD
from suanli.workloads.record import TrainingSettings


class Stepper:
    """A model, its optimiser and a plan.

    Attributes:
        model: The fp32 model that is trained, on the plan's device.
        optimizer: Its optimiser; a group's peak rate is its "initial_lr".
        averaging: The recipe's average of weights; None where it has none.
        replicas: The processes that share each batch.
        agreed: What they agreed on in the last step; None where there is one process.
        sharded: Whether each process holds its share of the model only.
        own_rates: What the settings' patterns for the rate matched, in lines.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: TrainPlan,
        replicas: Replicas | None = None,
    ) -> None:
        """Bring the model to the device and make its optimiser.

        Raises:
            BadInputError: The plan does not fit the model, or the optimiser is unknown.
        """
        self.recipe, self.plan = recipe, plan
        self.replicas = replicas or Replicas()
        self.agreed: Agreed | None = None
        self.model = arranged(model.to(plan.device), plan.memory_layout).train()
        self.sharded = plan.sharded and self.replicas.world > 1
        if self.sharded:
            if recipe.optimizer is not None or recipe.averaging is not None:
                raise BadInputError(
                    f"{recipe.name} has an optimiser or an average of its own, which need whole "
                    "tensors: a sharded run cannot train it"
                )
            shard(self.model, self.replicas)
        # it may change weights, as pruning does, so the plan's own copies are made after it
        self.averaging: Averaging | None = (
            recipe.averaging(self.model) if recipe.averaging is not None else None
        )
        assert recipe.workload.loss is not None
        self.forward = Forward(self.model, recipe.workload.loss, plan)
        make = recipe.optimizer or standard_optimizer
        self.optimizer = make(self.model, recipe.settings, plan)
        self.own_rates = apart(self.optimizer, self.model, recipe.settings.lr_of)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        # the generic update is called through this, so that it can be compiled
        self._apply: Any = self.optimizer.step
        if isinstance(self.optimizer, update.OnePass):
            self._apply = self.optimizer.update
        if plan.compile_scope == "step":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=plan.device)
            self._apply = torch.compile(self.optimizer.step)
        scaled = plan.precision == "fp16"
        self.scaler = torch.amp.GradScaler(plan.kind, enabled=scaled)

    def __call__(self, inputs: Tensors, labels: torch.Tensor, done: float) -> torch.Tensor:
        """One step at the share `done` of the run; gives the loss, detached."""
        loss = self.gradients(inputs, labels)
        self.update(done)
        return loss

    def gradients(
        self, inputs: Tensors, labels: torch.Tensor, *, stop: bool = False, seconds: float = 0.0
    ) -> torch.Tensor:
        """The first half: `grad` of every trained parameter; gives the loss, detached.

        Args:
            inputs: The whole batch; of several processes each takes its share of it.
            labels: The same.
            stop: Whether this process was asked to stop, for the others to know.
            seconds: This process's clock.
        """
        trained = [p for g in self.optimizer.param_groups for p in g["params"]]
        for parameter in trained:
            parameter.grad = None  # as zero_grad does, without its records for the profiler
        scale = 1.0
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=self.plan.device))  # its state is made on use
            scale = float(self.scaler.get_scale())
        if self.replicas.world == 1:
            loss = self.forward.gradients(inputs, labels, scale)
            self.forward.collect()
        else:
            loss = self._part(inputs, labels, scale)
            self.forward.collect()
            if self.sharded:  # the backward pass has summed the gradients
                self.agreed = self.replicas.agree(loss, stop=stop, seconds=seconds)
            else:
                self.agreed = self.replicas.exchange(trained, loss, stop=stop, seconds=seconds)
            loss = self.agreed.loss
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        clip = self.recipe.settings.clip_norm
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        return loss

    def _part(self, inputs: Tensors, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """This process's part of the gradients and of the loss."""
        rows = self.replicas.share(int(labels.shape[0]))
        mine = labels[rows]
        empty = len(mine) == 0  # the last batch of an epoch may be smaller than the group
        if empty and not self.sharded:
            return torch.zeros((), device=labels.device)
        if empty:  # all processes must gather the parameters together: one sample that counts 0
            rows, mine, scale = slice(0, 1), labels[:1], 0.0
        if self.sharded:
            scale *= self.replicas.world  # FSDP gives the mean over the processes
        last = self.plan.memory_layout == "channels_last"
        parts = tuple(
            x[rows].contiguous(
                memory_format=torch.channels_last
                if last and x.dim() == 4
                else torch.contiguous_format
            )
            for x in inputs
        )
        loss = self.forward.gradients(parts, mine, scale, labels)
        return torch.zeros_like(loss) if empty else loss

    def update(self, done: float) -> None:
        """The second half: the optimiser's step at the rate that belongs to `done`."""
        for group in self.optimizer.param_groups:
            value = group["initial_lr"] * rate(self.recipe, done, str(group.get("name", "")))
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self._apply()
        self.forward.take_over()

    def follow(self, step: int, done: float) -> None:
        """Let the average take in step number `step` (from 1), where there is one.

        Args:
            step: Of the run.
            done: Share of the run that is over with this step.
        """
        if self.averaging is not None:
            self.averaging.after_step(step, done)
            self.forward.take_over()  # it may have changed the weights

    def restore(
        self, model: dict[str, Any], optimizer: dict[str, Any], scaler: dict[str, Any]
    ) -> None:
        """Take over a saved state.

        Raises:
            RuntimeError: It is the state of another model.
        """
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    # kernels walk through memory: a state must lie as its parameter does
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
        self.forward.take_over()

    @property
    def peak_rates(self) -> list[float]:
        """The rate of each group that the schedule multiplies."""
        return [float(group["initial_lr"]) for group in self.optimizer.param_groups]

    @peak_rates.setter
    def peak_rates(self, rates: list[float]) -> None:
        for group, rate_ in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate_

    def close(self) -> None:
        """Leave the model without the plan's wrappings."""
        self.forward.close()

    def plain_model(self) -> nn.Module:
        """The trained model on the CPU, whole; of a sharded run all processes call it together."""
        if not self.sharded:
            return arranged(self.model.to("cpu"), "contiguous")
        model = self.recipe.workload.make_model()
        model.load_state_dict(gathered(self.model))
        return model


def standard_optimizer(
    model: nn.Module, settings: TrainingSettings, plan: TrainPlan
) -> torch.optim.Optimizer:
    """Torch's own optimiser of the settings' name, with the plan's kernels.

    Raises:
        BadInputError: There is none of that name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise BadInputError("no parameter of the model is trained")
    native = plan.optimizer_kernel == "native"
    kernel = {"fused": True}  # also for what the native update does not take
    if plan.optimizer_kernel in ("loop", "foreach"):
        kernel = {"foreach": plan.optimizer_kernel == "foreach"}
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        sgd = update.SGD if native else SGD
        return sgd(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=decay,
            **kernel,
        )
    if settings.optimizer not in ("adam", "adamw"):
        raise BadInputError(
            f"unknown optimizer {settings.optimizer!r}", next_step="sgd, adam, adamw"
        )
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    if native:
        adam = update.Adam
        kernel["decoupled_weight_decay"] = settings.optimizer == "adamw"
    made: torch.optim.Optimizer = adam(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=decay, **kernel
    )
    return made


def arranged(model: nn.Module, layout: str) -> nn.Module:
    """The model with its four-dimensional weights in a memory layout."""
    chosen = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    moved: nn.Module = model.to(memory_format=chosen)  # type: ignore[call-overload]
    return moved
