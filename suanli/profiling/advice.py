"""What to change, with the gain that the cost model expects: one rule per sort of change."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from suanli.base import units
from suanli.base.plan import Plan, Quantization
from suanli.base.profile_results import Advice
from suanli.base.train_plan import TrainPlan
from suanli.cost.cpu_manner import PAGE_FAULT_S
from suanli.engines.backends import backends, status
from suanli.profiling.expected import Basis
from suanli.profiling.measuring import Measured
from suanli.profiling.subjects import Subject
from suanli.profiling.waste import read_backs, tiny_calls

# What the cost model expects is off by more than this half of the time: less is none to name. What
# was measured, and is taken off the step, can be trusted further.
_LEAST_EXPECTED, _LEAST_MEASURED = 1.1, 1.02
_OF_MEASURED = ("data", "synchronisation", "memory")
_WHOLE = ("backend", "quantization")  # another way to compute everything, no cause in the step
_DATA_SHARE = 0.02
_MANY_CALLS = 300
_MUCH_IDLE = 0.25
_LARGE_BATCH = 32
_PAGES_SHARE = 0.05
_UPDATE_SHARE = 0.05
# A fused update passes once over parameters, gradients and states; the lists of tensors pass
# several times (counted for SGD with momentum and Adam in torch's `_multi_tensor_*` functions).
_UPDATE_PASSES = {"loop": 2.5, "foreach": 1.8, "fused": 1.0, "native": 1.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What rules look at.

    Attributes:
        faster: Precisions in which the device's ceilings are higher than in the plan's, best first.
        compiler: Whether torch.compile can be used here.
    """

    subject: Subject
    measured: Measured
    basis: Basis
    faster: tuple[str, ...]
    compiler: bool

    @property
    def step_ms(self) -> float:
        """The measured step."""
        return self.basis.step_ms

    def gain(self, saved_ms: float) -> float:
        """Speed-up where so many milliseconds go away."""
        return self.step_ms / max(self.step_ms - saved_ms, 0.01 * self.step_ms)

    def gain_of(self, plan: Plan | TrainPlan) -> float | None:
        """Speed-up that the cost model expects of another plan."""
        after = self.basis.step_with(plan)
        return self.step_ms / after if after else None


def advise(case: Case) -> list[Advice]:
    """Changes worth making: what ails this step first, then what would replace it as a whole.

    Each group by the expected gain, the largest first.
    """
    found = [advice for rule in RULES for advice in rule(case)]
    kept = [advice for advice in found if advice.expected_speedup >= _least(advice)]
    if any(advice.kind == "overhead" for advice in kept):  # which says the same, and why
        kept = [advice for advice in kept if advice.kind != "compile"]
    return sorted(kept, key=lambda advice: (advice.kind in _WHOLE, -advice.expected_speedup))


def _least(advice: Advice) -> float:
    return _LEAST_MEASURED if advice.kind in _OF_MEASURED else _LEAST_EXPECTED


def _data(case: Case) -> Iterator[Advice]:
    waited = case.basis.times.data_ms
    if waited < _DATA_SHARE * case.step_ms or not case.subject.training:
        return
    plan = case.subject.plan
    reason = f"each step waits {units.milliseconds(waited)} for its batch"
    own = case.subject.stepper is not None and case.subject.example is not None
    if isinstance(plan, TrainPlan) and own and not case.subject.own_loader:
        resident = plan.data != "resident"
        changed = plan.with_(data="resident", pinned=False) if resident else None
        yield Advice(
            change="keep the samples on the device" if resident else "make batches ahead",
            kind="data",
            reason=reason,
            how='data = "resident" in the plan' if resident else 'data = "streamed", prefetch = 2',
            expected_speedup=case.gain(waited),
            plan=changed or plan.with_(data="streamed", prefetch=2),
        )
        return
    yield Advice(
        change="load batches in worker processes, or keep them in memory",
        kind="data",
        reason=reason,
        how="DataLoader(num_workers=…, persistent_workers=True), or a data set held as tensors",
        expected_speedup=case.gain(waited),
    )


def _synchronisation(case: Case) -> Iterator[Advice]:
    recording = case.measured.recording
    if recording is None:
        return
    found = read_backs(recording)
    if found.count < 2 or not found.ms:
        return
    lines = Counter(line for line in case.measured.read_backs if line)
    where = f" at {lines.most_common(1)[0][0]}" if lines else ""
    scale = case.step_ms / recording.ms if recording.ms else 1.0
    yield Advice(
        change="read values out of tensors once per step, not one by one",
        kind="synchronisation",
        reason=f"{found.count:,} values are read back in a step{where}, by .item() or its like",
        how="keep them as tensors, and call .item() or .tolist() once where they are needed",
        expected_speedup=case.gain(found.ms * scale),
    )


def _small_calls(case: Case) -> Iterator[Advice]:
    recording = case.measured.recording
    if recording is None or case.subject.compiled:
        return
    tiny = tiny_calls(recording, case.basis.times.idle_ms)
    if tiny.count < _MANY_CALLS or tiny.ms < _MUCH_IDLE * case.step_ms:
        return
    found = read_backs(recording)
    plan = compiled_plan(case)
    if found.ms > 0.5 * tiny.ms or plan is None:
        return
    gain = case.gain_of(plan)
    if gain is None:
        return
    scope = "capture them in CUDA graphs" if case.subject.device != "cpu" else "compile them"
    yield Advice(
        change=f"compute fewer and larger operators, or {scope}",
        kind="overhead",
        reason=f"{tiny.count:,} calls of under 30 us take {tiny.ms / case.step_ms:.0%} of the step",
        how="work on whole tensors in the place of a Python loop; torch.compile fuses what is left",
        expected_speedup=gain,
        plan=plan,
    )


def compiled_plan(case: Case) -> Plan | TrainPlan | None:
    """The plan with torch.compile; None where it has it or cannot have it."""
    plan = case.subject.plan
    if not case.compiler or case.subject.model is None:
        return None
    if isinstance(plan, TrainPlan):
        return plan.with_(compile="default") if plan.compile == "none" else None
    if plan.backend != "eager":
        return None
    return plan.with_(backend="inductor")


def _precision(case: Case) -> Iterator[Advice]:
    plan = case.subject.plan
    if case.subject.model is None or plan.precision not in ("fp32", "tf32"):
        return
    if isinstance(plan, Plan) and plan.backend not in ("eager", "inductor", "openvino"):
        return
    # gradients of fp16 underflow, which bf16 spares a processor that has both
    narrow = case.subject.training and case.subject.device == "cpu"
    floats = [name for name in case.faster if name != "int8"]  # which quantises, and is no cast
    for precision in [name for name in floats if not (narrow and name == "fp16")][:1]:
        changed, how = plan.with_(precision=precision), f"precision = {precision!r} in the plan"
        words = f"run the products in {precision}"
        if _image_ms(case) and plan.memory_layout == "contiguous" and _moves_layout(plan):
            # the units want images channels last: alone the precision gains a part of it only
            changed = changed.with_(memory_layout="channels_last")
            words += ", with images channels last"
            how += ' and memory_layout = "channels_last"'
        gain = case.gain_of(changed)
        if gain is None:
            continue
        old = case.basis.ceilings.peak_flops(plan.precision) or 0.0
        new = case.basis.ceilings.peak_flops(precision) or 0.0
        ratio = f"{new / old:.1f} times" if old else "far"
        if isinstance(plan, Plan):
            how += "; `suanli optimize` proves that the answers stay right"
        yield Advice(
            change=words,
            kind="precision",
            reason=f"the device's products are {ratio} as fast in {precision}",
            how=how,
            expected_speedup=gain,
            plan=changed,
        )


def _moves_layout(plan: Plan | TrainPlan) -> bool:
    """Whether the layout is the plan's to choose; engines choose their own."""
    return isinstance(plan, TrainPlan) or plan.backend in ("eager", "inductor")


def _image_ms(case: Case) -> float:
    """Milliseconds of convolutions on images."""
    return sum(
        row.ms
        for row in case.basis.rows
        if any("conv" in op.name and _image(op.input_shapes) for op in row.operators)
    )


def _layout(case: Case) -> Iterator[Advice]:
    plan, spent = case.subject.plan, _image_ms(case)
    if plan.memory_layout != "contiguous" or case.subject.model is None:
        return
    if not spent or not _moves_layout(plan):
        return
    changed = plan.with_(memory_layout="channels_last")
    gain = case.gain_of(changed)
    if gain is not None:
        yield Advice(
            change="lay images out channels last (NHWC)",
            kind="layout",
            reason=f"convolutions take {spent / case.step_ms:.0%} of the step, and copy their "
            "images into that layout and back",
            how="model.to(memory_format=torch.channels_last), and the inputs likewise",
            expected_speedup=gain,
            plan=changed,
        )


def _image(shapes: tuple[tuple[int, ...], ...]) -> bool:
    return any(len(shape) == 4 for shape in shapes)


def _compile(case: Case) -> Iterator[Advice]:
    changed = compiled_plan(case)
    if changed is None:
        return
    gain = case.gain_of(changed)
    if gain is None:
        return
    small = sum(row.ms for row in case.basis.rows if not any(op.matmul for op in row.operators))
    yield Advice(
        change="compile the model",
        kind="compile",
        reason=f"{(small + case.basis.times.idle_ms) / case.step_ms:.0%} of the step is operators "
        "that can be fused, and the time between operators",
        how="torch.compile(model)",
        expected_speedup=gain,
        plan=changed,
    )


def _optimizer(case: Case) -> Iterator[Advice]:
    plan, spent = case.subject.plan, case.basis.times.optimizer_ms
    if not isinstance(plan, TrainPlan) or plan.optimizer_kernel in ("fused", "native"):
        return
    if spent < _UPDATE_SHARE * case.step_ms or case.subject.own_loader:
        return
    left = _UPDATE_PASSES["fused"] / _UPDATE_PASSES[plan.optimizer_kernel]
    yield Advice(
        change="fuse the update",
        kind="optimizer",
        reason=f"the optimiser takes {spent / case.step_ms:.0%} of the step in several passes",
        how='optimizer_kernel = "fused" in the plan, or fused=True for torch\'s optimiser',
        expected_speedup=case.gain(spent * (1 - left)),
        plan=plan.with_(optimizer_kernel="fused"),
    )


def _pages(case: Case) -> Iterator[Advice]:
    plan = case.subject.plan
    if not isinstance(plan, TrainPlan) or plan.keep_memory or plan.kind != "cpu":
        return
    times = sorted(t.faults for t in case.measured.times)
    faults = times[len(times) // 2]
    spent = 1e3 * faults * PAGE_FAULT_S
    if spent < _PAGES_SHARE * case.step_ms:
        return
    yield Advice(
        change="keep freed memory in the process",
        kind="memory",
        reason=f"a step faults {faults:,} pages of memory in anew",
        how="keep_memory = true in the plan (glibc's allocator gives pages back at once)",
        expected_speedup=case.gain(spent),
        plan=plan.with_(keep_memory=True),
    )


def _batch(case: Case) -> Iterator[Advice]:
    size = case.basis.batch
    if case.subject.training or case.subject.model is None or size >= _LARGE_BATCH:
        return
    larger = _LARGE_BATCH if size == 1 else min(4 * size, _LARGE_BATCH)
    after = case.basis.step_at(larger)
    gain = (larger / after) / (size / case.step_ms) if after else 0.0
    if gain < 1.1:
        return
    yield Advice(
        change=f"compute {larger} samples in a step",
        kind="batch",
        reason=f"a batch of {size} reads all weights and pays all calls for {size} "
        f"sample{'s' if size > 1 else ''}",
        how=f"--batch {larger}, where answers may wait for each other (gain in samples per second)",
        expected_speedup=gain,
        batch=larger,
    )


def _engine(case: Case) -> Iterator[Advice]:
    plan = case.subject.plan
    if not isinstance(plan, Plan) or plan.backend not in ("eager", "inductor"):
        return
    if case.subject.model is None or not _openvino(case):
        return
    precision = "bf16" if "bf16" in case.faster or plan.precision == "bf16" else "fp32"
    changed = Plan(backend="openvino", precision=precision, device=plan.device)  # type: ignore[arg-type]
    gain = case.gain_of(changed)
    if gain is not None:
        yield Advice(
            change=f"build an engine (OpenVINO, {precision})",
            kind="backend",
            reason="an inference engine folds what stands between products into them",
            how="suanli optimize finds the fastest one that is right",
            expected_speedup=gain,
            plan=changed,
        )


def _openvino(case: Case) -> bool:
    """Whether the engine of the rules below can be built here."""
    row = backends().get("openvino")
    return case.subject.device == "cpu" and row is not None and status(row).present


def _quantization(case: Case) -> Iterator[Advice]:
    plan = case.subject.plan
    if not isinstance(plan, Plan) or plan.quantized or "int8" not in case.faster:
        return
    if (case.subject.model is None and case.subject.kind != "engine") or not _openvino(case):
        return
    changed = Plan(
        backend="openvino",
        precision="int8",
        device=plan.device,
        quantization=Quantization(scheme="int8-static", calibration_samples=case.basis.batch),
    )
    gain = case.gain_of(changed)
    if gain is not None:
        largest = max(case.basis.rows, key=lambda r: r.ms * any(o.matmul for o in r.operators))
        yield Advice(
            change="quantise to int8, where labels allow it",
            kind="quantization",
            reason=f"products have units for int8 here; the largest is {largest.module or 'one'} "
            f"({largest.ms / case.step_ms:.0%} of the step)",
            how="suanli optimize with labelled data, --max-drop POINTS",
            expected_speedup=gain,
            plan=changed,
        )


RULES: tuple[Callable[[Case], Iterator[Advice]], ...] = (
    _data,
    _synchronisation,
    _small_calls,
    _precision,
    _layout,
    _compile,
    _optimizer,
    _pages,
    _batch,
    _engine,
    _quantization,
)
