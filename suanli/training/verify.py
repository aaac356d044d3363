"""Whether a training plan learns what the plain loop learns, step by step.

From the same weights, in the same data order, a plan's first steps are recorded: the loss, each
tensor's gradient and update, the buffers, and the model's answers in evaluation mode afterwards.
They are held against a deterministic float64 run (float32 where the model refuses float64). How far
they may be from it is what eager itself is at the plan's precision, times k.

Eager runs three times: as it is, and twice from weights that are up to half a unit in the last
place away, because a plan is compared with the size of rounding errors, not with one draw of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from suanli.base.train_plan import TrainPlan
from suanli.base.trial import OutputError, ValueCheck
from suanli.training.batches import Batch
from suanli.training.chance import dropout_off, seed_all
from suanli.training.kernels import EMULATED_FP8
from suanli.training.recipe import Recipe, Tensors
from suanli.training.step import Stepper
from suanli.workloads.stream import own_generators

Trace = Mapping[str, torch.Tensor]
"""Values by name: loss/S, gradient/S/PARAMETER, update/S/PARAMETER, buffer/NAME and output.

Where the recipe averages weights also average/PARAMETER, its change since the start, and
average-buffer/NAME.
"""

K = 2.0
# Kinds of one step each. Into buffers, answers and averages the errors of all steps have run, and
# Adam turns the sign of a gradient that is nothing but rounding into a whole step: their spread
# from run to run is wider.
_EARLY = ("loss", "gradient", "update")
_LATE = 2.0
_EPSILON = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-9, "fp16": 2.0**-11}
_EPSILON["fp8"] = _EPSILON["bf16"]  # but for some products, whose error eager has as well
# Relative errors below so many units in the last place of fp32 always pass: other orders of sums.
_FLOOR_ULPS = 64
# The norm of an error over n values is itself uncertain by about this over sqrt(n).
_SMALL = 4.0
# What gain and size may be off beside k times eager's own, in units in the last place.
_GAIN_ULPS = 1.0
_FP32_GAIN = 1e-4
# An update that eager misses by more than this share of it is rounding that Adam made large (a bias
# before batch norm). It says nothing of gain and size.
_NOISE = 0.25
# Of gradients: with more than this, k times eager's error is about the gradient itself, and one
# that is missing would pass.
_FAR = 0.9 / K
_CLEAR_SHARE = 0.5
_CHANCE_SEED = 1
_BEYOND = 1e9  # JSON has no infinities


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where a plan parted from the reference.

    Attributes:
        name: Key of the trace.
        what: "error", "gain" or "size"; "noise" where eager itself is so far off that its error
            shows nothing.
        ratio: What was found over what is allowed (1 is the limit).
    """

    name: str
    what: str
    ratio: float
    found: float
    allowed: float

    def __str__(self) -> str:
        kind, _, rest = self.name.partition("/")
        step, _, tensor = rest.partition("/")
        where = f"step {step}: " if step.isdigit() else "after the steps: "
        if self.what == "noise":
            return (
                f"{where}eager itself is {self.found:.2g} off in its gradients at this precision, "
                f"{self.allowed:g} is the most at which its error shows anything"
            )
        title = f"{kind} of {tensor}" if tensor else kind if step.isdigit() else f"{kind} {rest}"
        words = {"error": "differs by", "gain": "is off along the reference by"}.get(
            self.what, "has a size that is off by"
        )
        return (
            f"{where}{title.strip()} {words} {self.found:.3g} of its size, "
            f"{self.allowed:.3g} is allowed"
        )


def record(stepper: Stepper, batches: Sequence[Batch], total_steps: int, probe: Tensors) -> Trace:
    """Run the first steps as the loop does and keep what they did, as fp32 on the CPU.

    What functions drop is kept, and other chance is drawn from one seed, so that a layer that is
    left out at random is left out in each run that is compared.

    Args:
        stepper: At its start; it is trained further.
        batches: One per step.
        total_steps: Steps of the whole run, which the schedule of the rate is over.
        probe: Inputs for the evaluation mode afterwards.
    """
    devices = [torch.device(stepper.plan.device)] if stepper.plan.kind == "cuda" else []
    with own_generators(), torch.random.fork_rng(devices=devices), dropout_off():
        seed_all(_CHANCE_SEED)
        return _recorded(stepper, batches, total_steps, probe)


def _recorded(
    stepper: Stepper, batches: Sequence[Batch], total_steps: int, probe: Tensors
) -> Trace:
    trace: dict[str, torch.Tensor] = {}
    names = {id(p): n for n, p in stepper.model.named_parameters()}
    trained = [p for g in stepper.optimizer.param_groups for p in g["params"]]
    start = [p.detach().clone() for p in trained] if stepper.averaging is not None else []
    for number, batch in enumerate(batches, start=1):
        before = [p.detach().clone() for p in trained]
        # a forward that changes its input must not change that of the next run
        loss = stepper.gradients(_copied(batch.inputs), batch.labels)
        trace[f"loss/{number}"] = _kept(loss.reshape(1))
        for parameter in trained:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            trace[f"gradient/{number}/{names[id(parameter)]}"] = _kept(gradient)
        stepper.update((number - 1) / total_steps)
        stepper.follow(number, number / total_steps)
        for parameter, old in zip(trained, before, strict=True):
            trace[f"update/{number}/{names[id(parameter)]}"] = _kept(parameter.detach() - old)
    for name, buffer in stepper.model.named_buffers():
        trace[f"buffer/{name}"] = _kept(buffer)
    stepper.model.eval()
    with torch.no_grad():
        predict = stepper.recipe.predict
        probe = _copied(probe)
        answer = predict(stepper.model, probe) if predict else stepper.model(*probe)
        trace["output"] = _kept(answer)
    stepper.model.train()
    if stepper.averaging is not None:  # what the run would end with here
        stepper.averaging.finish()
        for parameter, first in zip(trained, start, strict=True):
            trace[f"average/{names[id(parameter)]}"] = _kept(parameter.detach() - first)
        for name, buffer in stepper.model.named_buffers():
            trace[f"average-buffer/{name}"] = _kept(buffer)
    return trace


def eager_plan(device: str, precision: str) -> TrainPlan:
    """What a person's loop computes at a precision: the yardstick of errors.

    For fp8, which no loop of plain operators has, it rounds to fp8 and multiplies in fp32.
    """
    kernels = (EMULATED_FP8,) if precision == "fp8" else ()
    plan = TrainPlan(device=device, optimizer_kernel="loop", kernels=kernels)
    return plan.with_(precision=precision)


def reference_trace(
    model: nn.Module, recipe: Recipe, batches: Sequence[Batch], total: int, probe: Tensors
) -> tuple[Trace, str]:
    """The deterministic run that everything is held against, on the CPU, in float64.

    Returns:
        The trace, and why it is not in float64 ("" if it is).
    """
    plan = eager_plan("cpu", "fp32")
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        try:
            stepper = Stepper(model.double(), recipe, plan)
            wide = [_wide(batch) for batch in batches]
            return record(stepper, wide, total, _doubled(probe)), ""
        except (RuntimeError, TypeError) as error:
            reason = f"the reference is in fp32: {' '.join(str(error).split())[:120]}"
    finally:
        torch.use_deterministic_algorithms(was)
    return {}, reason


def moved_weights(model: nn.Module, precision: str, seed: int = 1) -> None:
    """Move each weight by up to half a unit in the last place of a precision, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
            parameter.mul_(1 + _EPSILON[precision] * noise.to(parameter.dtype))


def compare(
    candidate: Trace, reference: Trace, eager: Sequence[Trace], precision: str, k: float = K
) -> ValueCheck:
    """Hold a plan's trace against the reference, by the error that eager makes.

    For each entry, with ‖·‖ the Euclidean norm and n its size:

    - ‖candidate - reference‖ <= k (1 + 4/sqrt(n)) E, where E is the largest of eager's own errors,
      the median of eager's relative errors in the same step and kind times ‖reference‖, 64 units in
      the last place of fp32 times it, and a unit in the last place of the precision times the size
      that a tensor of n values of the step's rms would have (which is for gradients that are zero
      but for rounding, such as those of a bias before batch norm);
      For buffers, answers and averages twice that;
    - for the updates of a step together, without those that are noise in eager itself: the
      projection on the reference and the norm may be off by k times what eager's are, plus a unit
      in the last place of the precision. A rate that is wrong shows there, even where noise hides
      it in each single tensor;
    - where eager itself misses most of a step's gradients by more than 0.45 of their size, so that
      k times it is nearly all of them, the step shows nothing. Where that is the first step, or
      most of them, the plan is refused. (Not its updates: Adam's first one is hardly more than the
      gradient's signs, and small values change theirs at any precision.)

    Integers (counts of batches) have to be equal.

    Returns:
        The check; its reason names the first step and the tensor where the plan parted.
    """
    if missing := sorted(reference.keys() ^ candidate.keys()):
        return ValueCheck(ok=False, k=k, reason=f"{missing[0]} is only in one of the two runs")
    groups: dict[str, list[str]] = {}
    for name in reference:
        groups.setdefault(_group(name), []).append(name)
    summaries, worst, noise = [], None, list[Parting]()
    for group, names in groups.items():
        partings = _group_partings(group, names, candidate, reference, eager, precision, k)
        if not partings:
            continue
        summaries.append(_summary(group, partings))
        noise += [p for p in partings if p.what == "noise"]
        beyond = [p for p in partings if not p.ratio <= 1.0]
        if beyond and worst is None:  # groups come in the order of the steps
            worst = max(beyond, key=lambda p: p.ratio if math.isfinite(p.ratio) else math.inf)
    reason = _shows_nothing(noise) or ("" if worst is None else str(worst))
    return ValueCheck(
        ok=not reason,
        k=k,
        outputs=tuple(summaries),
        batches=(),
        reason=reason,
    )


def _group(name: str) -> str:
    kind, _, rest = name.partition("/")
    step = rest.partition("/")[0]
    return f"{kind}/{step}" if kind in _EARLY else kind


def _group_partings(
    group: str,
    names: Sequence[str],
    candidate: Trace,
    reference: Trace,
    eager: Sequence[Trace],
    precision: str,
    k: float,
) -> list[Parting]:
    """One entry per tensor of a group, and for updates those of all of them together."""
    found: list[Parting] = []
    floats = [n for n in names if reference[n].is_floating_point()]
    for name in set(names) - set(floats):
        if not torch.equal(candidate[name], reference[name]):
            found.append(Parting(name=name, what="error", ratio=math.inf, found=1.0, allowed=0.0))
    if not floats:
        return found
    sizes = {n: _norm(reference[n]) for n in floats}
    own = {n: max(_distance(run[n], reference[n]) for run in eager) for n in floats}
    relative = sorted(own[n] / sizes[n] for n in floats if sizes[n] > 0)
    median = relative[len(relative) // 2] if relative else 0.0
    count = sum(reference[n].numel() for n in floats)
    rms = math.sqrt(sum(size**2 for size in sizes.values()) / max(count, 1))
    for name in floats:
        n = max(reference[name].numel(), 1)
        earned = max(
            own[name],
            median * sizes[name],
            _FLOOR_ULPS * _EPSILON["fp32"] * sizes[name],
            _EPSILON[precision] * rms * math.sqrt(n),
        )
        late = 1.0 if group.partition("/")[0] in _EARLY else _LATE
        allowed = k * late * (1 + _SMALL / math.sqrt(n)) * earned
        if not math.isfinite(allowed):  # eager itself overflows: then nothing is shown by it
            allowed = 0.0
        error = _distance(candidate[name], reference[name])
        size = sizes[name] or rms * math.sqrt(n) or 1.0
        found.append(_parting(name, "error", error / size, allowed / size))
    if group.startswith("gradient"):
        found.append(_noise(group, own, sizes, _FAR))
    if group.startswith("update"):
        noisy = _noise(group, own, sizes, _NOISE).found
        clear = floats if noisy else [n for n in floats if own[n] <= _NOISE * sizes[n]]
        found += _together(group, clear, candidate, reference, eager, precision, k)
    return found


def _noise(
    group: str, own: Mapping[str, float], sizes: Mapping[str, float], most: float
) -> Parting:
    """How far eager is off in all tensors of a group, where it is in most by over `most`; else 0.

    By itself that rejects nothing (its ratio is 0): see `_shows_nothing`.
    """
    whole = sum(size**2 for size in sizes.values())
    clear = sum(size**2 for name, size in sizes.items() if own[name] <= most * size)
    off = 0.0
    if clear < _CLEAR_SHARE * whole:
        off = math.sqrt(sum(error**2 for error in own.values()) / whole)
    return Parting(name=group, what="noise", ratio=0.0, found=off, allowed=most)


def _shows_nothing(steps: Sequence[Parting]) -> str:
    """Why eager's error shows nothing, from what `_noise` found in each step; "" if it does.

    At the first step there is nothing but the rounding of that step. Later the runs have parted, at
    a high rate even those in fp32, and it takes more than half of the steps.
    """
    noisy = [step for step in steps if step.found]
    if noisy and (noisy[0] is steps[0] or 2 * len(noisy) > len(steps)):
        return str(noisy[0])
    return ""


def eager_too_far(reference: Trace, eager: Sequence[Trace]) -> str:
    """Why no plan of a precision can be verified: eager itself is too far off there; "" if not.

    Args:
        reference: What everything is held against.
        eager: Eager's own runs at the precision.
    """
    steps: dict[str, list[str]] = {}
    for name in reference:
        if name.startswith("gradient/") and reference[name].is_floating_point():
            steps.setdefault(_group(name), []).append(name)
    found = []
    for group, names in steps.items():
        sizes = {n: _norm(reference[n]) for n in names}
        own = {n: max(_distance(run[n], reference[n]) for run in eager) for n in names}
        found.append(_noise(group, own, sizes, _FAR))
    return _shows_nothing(found)


def _together(
    group: str,
    names: Sequence[str],
    candidate: Trace,
    reference: Trace,
    eager: Sequence[Trace],
    precision: str,
    k: float,
) -> list[Parting]:
    """Gain and size of all updates of a step."""
    floor = max(_GAIN_ULPS * _EPSILON[precision], _FP32_GAIN)
    mine = _gain_and_size(names, candidate, reference)
    theirs = [_gain_and_size(names, run, reference) for run in eager]
    return [
        _parting(group, what, abs(mine[i]), k * max(abs(pair[i]) for pair in theirs) + k * floor)
        for i, what in enumerate(("gain", "size"))
    ]


def _gain_and_size(names: Sequence[str], run: Trace, reference: Trace) -> tuple[float, float]:
    """Relative error of the projection on the reference, and of the norm."""
    along = sum(float((run[n].double() * reference[n].double()).sum()) for n in names)
    square = sum(float(reference[n].double().square().sum()) for n in names)
    own = sum(float(run[n].double().square().sum()) for n in names)
    if square == 0:
        return (0.0, 0.0) if own == 0 else (math.inf, math.inf)
    return along / square - 1.0, math.sqrt(own / square) - 1.0


def _parting(name: str, what: str, found: float, allowed: float) -> Parting:
    ratio = found / allowed if allowed > 0 else (0.0 if found == 0 else math.inf)
    return Parting(name=name, what=what, ratio=ratio, found=found, allowed=allowed)


def _summary(group: str, partings: Sequence[Parting]) -> OutputError:
    """The worst tensor of a group, in the fields that reports know."""
    worst = max(partings, key=lambda p: p.ratio if not math.isnan(p.ratio) else math.inf)
    gains = [p.ratio for p in partings if p.what in ("gain", "size")]
    return OutputError(
        name=worst.name if worst.what == "error" else group,
        rms=min(worst.found, _BEYOND),
        eager_rms=min(worst.allowed / K, _BEYOND),
        max_abs=0.0,
        eager_max_abs=0.0,
        rms_ratio=min(worst.ratio, _BEYOND) * K,
        max_ratio=0.0,
        bias_ratio=0.0,
        gain_ratio=min(max(gains, default=0.0), _BEYOND) * K,
    )


def _norm(values: torch.Tensor) -> float:
    return float(values.double().norm())


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference; infinite where something is not finite."""
    if one.shape != other.shape:
        return math.inf
    value = float((one.double() - other.double()).norm())
    return value if math.isfinite(value) else math.inf


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    # fp32 is exact enough for a reference too: what is judged is 64 of its last places and more
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _copied(inputs: Tensors) -> Tensors:
    return tuple(part.clone() for part in inputs)


def _wide(batch: Batch) -> Batch:
    labels = batch.labels
    labels = labels.double() if labels.is_floating_point() else labels
    return replace(batch, inputs=_doubled(batch.inputs), labels=labels.cpu())


def _doubled(inputs: Tensors) -> Tensors:
    return tuple(x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs)
