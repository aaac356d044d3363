"""A training plan: every decision on how a step is computed, and none on what is learnt.

Batch, optimiser, rates and epochs are hyper-parameters and stand elsewhere: a plan may not change
what the model becomes, only how fast.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from suanli.base.errors import BadInputError
from suanli.base.plan import Option, Plan, Precision

TrainPrecision = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
_SHARED = ("device", "precision", "memory_layout", "threads")


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How to compute training steps. The defaults are what a plain PyTorch loop does.

    Attributes:
        device: "cpu", "cuda:0", …
        precision: What the matrix products run in. "bf16" and "fp16" are autocast; "fp16" scales
            the loss so that small gradients survive. "fp8" is for the products of linear layers but
            the last, scaled per tensor; the rest is as in "bf16".
        weights: "fp32", or "bf16": the step works on bf16 copies of the matrix weights, and the
            optimiser keeps the fp32 masters (for precision "bf16" only, and without autocast).
        memory_layout: Of four-dimensional inputs and weights.
        compile: torch.compile's mode, or "none"; "reduce-overhead" records CUDA graphs.
        compile_scope: "model" compiles the forward and backward pass; "step" also the loss and the
            optimiser; "joint" makes one graph of the forward pass, the loss and the backward pass,
            which runs without autograd.
        optimizer_kernel: "loop" (one tensor after the other), "foreach", "fused", or "native": all
            parameters in one pass of a kernel of our own (CPU).
        micro_batch: Samples of one forward pass; 0 is the whole batch. Gradients accumulate.
        checkpointing: Recompute the activations of every block in the backward pass.
        data: "resident": all samples stay on the device; "streamed": batches are brought there.
        workers: Processes that read the samples of a streamed data set; 0 reads them in between.
            Tensors need none.
        prefetch: Streamed batches that a thread prepares ahead, or that the workers read ahead; 0
            prepares them in between.
        pinned: Whether streamed batches pass through page-locked memory.
        threads: CPU threads of the step; 0 is all usable cores.
        keep_memory: Freed memory stays in the process (glibc's allocator; on CUDA: expandable
            segments), so that no step faults it in anew.
        flush_denormals: On a CPU, numbers below the smallest normal one count as zero (1.2e-38 in
            fp32). Optimisers leave many behind, which processors take long for.
        kernels: Rows of the table of fused kernels (`training.kernels`) put in the model's place.
        sharded: Of several processes each keeps its share of parameters, gradients and optimiser
            state (FSDP2), and gathers a block's parameters when it computes with them.
    """

    device: str = "cpu"
    precision: TrainPrecision = "fp32"
    weights: Literal["fp32", "bf16"] = "fp32"
    memory_layout: Literal["contiguous", "channels_last"] = "contiguous"
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    compile_scope: Literal["model", "step", "joint"] = "model"
    optimizer_kernel: Literal["loop", "foreach", "fused", "native"] = "foreach"
    micro_batch: int = 0
    checkpointing: bool = False
    data: Literal["resident", "streamed"] = "streamed"
    workers: int = 0
    prefetch: int = 0
    pinned: bool = False
    threads: int = 0
    keep_memory: bool = False
    flush_denormals: bool = False
    kernels: tuple[str, ...] = ()
    sharded: bool = False

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name the plan: equal plans have equal keys."""
        return self.as_plan().key

    @property
    def title(self) -> str:
        """One short line for a table."""
        return self.as_plan().title

    @property
    def kind(self) -> str:
        """The device's kind: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    def with_(self, **changes: Any) -> "TrainPlan":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_plan(self) -> Plan:
        """The same decisions as the `Plan` that search, store and reports understand.

        What differs from the defaults becomes an option; the backend is "eager", or "inductor"
        where something is compiled, or "native" where kernels of our own take part.
        """
        backend = "eager" if self.compile == "none" else "inductor"
        options: dict[str, Option] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _SHARED or value == field.default:
                continue
            options[field.name] = ",".join(value) if isinstance(value, tuple) else value
        precision: Precision = self.precision
        return Plan(
            backend="native" if self.kernels else backend,
            precision=precision,
            device=self.device,
            memory_layout=self.memory_layout,
            threads=self.threads,
            options=options,
        )

    @classmethod
    def from_plan(cls, plan: Plan) -> "TrainPlan":
        """The inverse of `as_plan`.

        Raises:
            BadInputError: It is no training plan.
        """
        values: dict[str, Any] = {name: getattr(plan, name) for name in _SHARED}
        names = {field.name for field in fields(cls)}
        for name, value in plan.options.items():
            if name not in names:
                raise BadInputError(f"{name!r} is no decision of a training plan")
            values[name] = tuple(str(value).split(",")) if name == "kernels" else value
        return cls(**values).checked()

    def checked(self) -> "TrainPlan":
        """This plan.

        Raises:
            BadInputError: A value is unknown, or two decisions exclude each other.
        """
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                known = ", ".join(get_args(hint))
                raise BadInputError(
                    f"{name} cannot be {getattr(self, name)!r} in a training plan",
                    next_step=f"one of {known}",
                )
        wrong = _contradiction(self)
        if wrong:
            raise BadInputError(f"this training plan contradicts itself: {wrong}")
        return self


def _contradiction(plan: TrainPlan) -> str:
    """Two decisions that exclude each other, in words; "" where there are none."""
    if min(plan.micro_batch, plan.workers, plan.prefetch, plan.threads) < 0:
        return "micro_batch, workers, prefetch and threads are counts"
    if plan.workers and plan.data == "resident":
        return "workers read samples that are streamed, and not those that stay on the device"
    if plan.weights == "bf16" and plan.precision != "bf16":
        return "bf16 weights need precision bf16"
    if plan.precision == "tf32" and plan.kind != "cuda":
        return "tf32 exists on GPUs only"
    if plan.pinned and (plan.kind != "cuda" or plan.data == "resident"):
        return "page-locked memory is for batches streamed to a GPU"
    if plan.compile == "reduce-overhead" and plan.kind != "cuda":
        return "reduce-overhead records CUDA graphs, and there is no GPU in it"
    if plan.compile == "none" and plan.compile_scope != "model":
        return "a scope of compilation without compilation"
    again = plan.checkpointing and "attention" in plan.kernels
    native = plan.optimizer_kernel == "native"
    apart = native and (plan.kind != "cpu" or plan.compile_scope == "step")
    found = (
        "the native update is for CPUs, and nothing that torch.compile takes" if apart else "",
        "attention by products is not computed a second time" if again else "",
        _against_one_graph(plan) if plan.compile_scope == "joint" else "",
        _against_sharding(plan) if plan.sharded else "",
    )
    return next(filter(None, found), "")


def _against_one_graph(plan: TrainPlan) -> str:
    """What a plan decides that a joint graph does not allow; "" where there is nothing."""
    wrong = {
        "a mode of compilation": plan.compile != "default",
        "fp16": plan.precision == "fp16",  # its gradients are scaled when it is too late
        "checkpointing": plan.checkpointing,
    }
    found = [name for name, is_there in wrong.items() if is_there]
    return f"one joint graph does not go with {', '.join(found)}" if found else ""


def _against_sharding(plan: TrainPlan) -> str:
    """What a plan decides that parameters in shares do not allow; "" where there is nothing."""
    wrong = {
        "channels_last": plan.memory_layout != "contiguous",  # FSDP2 wants them without gaps
        "bf16 weights": plan.weights != "fp32",
        "fp16": plan.precision == "fp16",
        "fp8": plan.precision == "fp8",
        "compilation": plan.compile != "none",
        "micro_batch": plan.micro_batch > 0,  # processes would gather a different number of times
        "kernels of our own": bool(plan.kernels),
    }
    found = [name for name, is_there in wrong.items() if is_there]
    return f"parameters in shares do not go with {', '.join(found)}" if found else ""
