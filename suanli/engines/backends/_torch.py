"""What the torch backends share: calling a flat module honestly, and timing its operators."""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.files import cache_dir
from suanli.base.lazy import present
from suanli.base.plan import BackendSpec, Plan, Precision
from suanli.base.signature import Signature
from suanli.devices.cpu_facts import usable_cores
from suanli.engines.backend import LayerTime
from suanli.engines.backends._graph import constant_outputs, flat_module
from suanli.engines.backends._pieces import batch_of, check_split, pieces
from suanli.engines.backends._precision import DTYPES
from suanli.engines.program import Program, register_known_trees

Flat = Sequence[torch.Tensor]
FlatCall = Callable[..., Sequence[torch.Tensor]]

COMPILER_INSTALL = "apt-get install g++"
_PROFILED_CALLS = 3


def source_baseline(
    backend: str, precision: Precision, device: str = "cpu", **options: bool | str
) -> Plan:
    """A plan that runs the person's own module, as they would without Suanli."""
    return Plan(
        backend=backend, precision=precision, device=device, options={"source": True, **options}
    )


def need_offered(spec: BackendSpec, plan: Plan, *, also: Sequence[str] = ()) -> None:
    """Refuse a plan that quantises, or computes in a precision that a backend does not offer.

    Args:
        spec: The backend's.
        plan: The plan.
        also: Precisions that no search offers, and a plan may ask for.

    Raises:
        SuanliError: It is not offered.
    """
    kind = plan.device.partition(":")[0]
    if plan.quantized or plan.precision not in (*spec.precisions[kind], *also):
        raise SuanliError(f"{spec.name} does not offer {plan.title}")


class TorchRunner:
    """Runs a call on flat tensors under a plan's threads, flags and split of the batch."""

    def __init__(
        self,
        call: FlatCall,
        signature: Signature,
        plan: Plan,
        *,
        owned: Sequence[torch.Tensor] = (),
        copied: Iterable[int] = (),
    ) -> None:
        """Wrap a call.

        Args:
            call: Takes the signature's tensors, gives the outputs in order.
            signature: Calling convention; outputs are brought to its dtypes.
            plan: Its device, precision, threads, `sub_batch` and option "autocast" are used.
            owned: Tensors that live as long as the call, such as weights: an output in their
                memory is copied.
            copied: Positions of the outputs that are always copied.
        """
        check_split(signature, plan)
        self._call = call
        self._signature = signature
        self._plan = plan
        self._device = torch.device(plan.device)
        self._dtypes = [getattr(torch, spec.dtype) for spec in signature.outputs]
        self._owned = frozenset(_storage(tensor) for tensor in owned)
        self._copied = frozenset(copied)
        self._threads = threads_of(plan)

    def __call__(self, inputs: Flat) -> list[torch.Tensor]:
        """Compute one batch, see `suanli.engines.backend.Runner`."""
        home = inputs[0].device if inputs else self._device
        placed = [tensor.to(self._device) for tensor in inputs]
        with self._conditions():
            outputs = self._split(placed)
        outputs = [tensor.to(home) for tensor in outputs]
        if not torch.is_inference_mode_enabled():
            # what leaves inference mode is a tensor as any other, to change or to train on
            outputs = [tensor.clone() if tensor.is_inference() else tensor for tensor in outputs]
        return outputs

    def layer_times(self, inputs: Flat) -> list[LayerTime]:
        """Times of the operators or kernels of one call, by torch's profiler.

        The profiler adds a microsecond or so to each operator, so that the sum of a model of many
        tiny operators is above the step's time.
        """
        self(inputs)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profile:
            warnings.simplefilter("ignore")
            for _ in range(_PROFILED_CALLS):
                self(inputs)
        return _layer_times(profile, self._device.type)

    def close(self) -> None:
        """Forget the model."""

        def closed(*_: torch.Tensor) -> Sequence[torch.Tensor]:
            raise SuanliError("this runner is closed")

        self._call = closed

    def _conditions(self) -> AbstractContextManager[None]:
        return conditions(self._plan, self._threads)

    def _split(self, placed: Flat) -> list[torch.Tensor]:
        if not self._plan.sub_batch:
            return self._finish(self._call(*placed), placed)
        batch = batch_of(self._signature, placed)
        parts = []
        for start, end in pieces(batch, 1, self._plan.sub_batch):
            piece = [
                tensor[start:end] if spec.batched else tensor
                for tensor, spec in zip(placed, self._signature.inputs, strict=True)
            ]
            parts.append(self._finish(self._call(*piece), piece))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _finish(self, outputs: Flat, inputs: Flat) -> list[torch.Tensor]:
        """Bring outputs to the signature's dtypes, in memory that nobody else holds."""
        finished = [
            output if output.dtype == dtype else output.to(dtype)
            for output, dtype in zip(outputs, self._dtypes, strict=True)
        ]
        taken = {_storage(tensor) for tensor in inputs}
        for i, output in enumerate(finished):
            where = _storage(output)
            if i in self._copied or where in taken or where in self._owned:
                finished[i] = output.clone(memory_format=torch.contiguous_format)
            taken.add(_storage(finished[i]))
        return finished


@dataclass(frozen=True)
class Prepared:
    """What a plan runs.

    Attributes:
        call: Takes the signature's tensors, gives the outputs in order.
        owned: Tensors that live as long as it.
        constant: See `constant_outputs`.
    """

    call: FlatCall
    owned: tuple[torch.Tensor, ...]
    constant: frozenset[int] = frozenset()

    def runner(
        self, signature: Signature, plan: Plan, call: FlatCall | None = None, *, copy: bool = False
    ) -> TorchRunner:
        """A runner of this call, or of another one that computes the same.

        Args:
            signature: Calling convention.
            plan: The plan.
            call: What to run instead.
            copy: Whether every output must be copied.
        """
        copied = range(len(signature.outputs)) if copy else self.constant
        # a compiled module has no length, and asking whether it is true asks for that
        call = self.call if call is None else call
        return TorchRunner(call, signature, plan, owned=self.owned, copied=copied)


def prepared_graph(program: Program, plan: Plan) -> tuple[fx.GraphModule, Prepared]:
    """The exported graph as the plan wants it, see `flat_module`, and as a call.

    Raises:
        SuanliError: The model has no exported program, or not in this precision.
    """
    module = flat_module(program, plan)
    owned = (*module.parameters(), *module.buffers())
    return module, Prepared(module, owned, constant_outputs(module))


def prepared_source(
    program: Program,
    plan: Plan,
    compiled: Callable[[nn.Module], Callable[..., Any]] = lambda module: module,
) -> Prepared:
    """The user's own module, cast with `.to(dtype)`, called as its user calls it.

    A module that cannot be built here stands in as its exported graph.

    Args:
        program: The captured model.
        plan: Its device, precision, layout and option "autocast" are used.
        compiled: What the user does with the module before calling it.
    """
    if not program.meta.ref:
        graph, ready = prepared_graph(program, plan)
        return Prepared(compiled(graph), ready.owned, ready.constant)
    dtype = torch.float32 if plan.options.get("autocast") else DTYPES[plan.precision]
    module = program.source_module().to(plan.device).requires_grad_(False)
    if dtype != torch.float32:
        module = module.to(dtype)
    channels_last = plan.memory_layout == "channels_last"
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    function = compiled(module)
    signature = program.signature
    register_known_trees(signature.in_tree)
    tree = pytree.treespec_loads(signature.in_tree)
    static = signature.static_inputs

    def call(*flat: torch.Tensor) -> Sequence[torch.Tensor]:
        tensors = iter(flat)
        leaves = [static[i] if i in static else next(tensors) for i in range(tree.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        result = pytree.tree_leaves(function(*args, **kwargs))
        return [leaf for leaf in result if isinstance(leaf, torch.Tensor)]

    def cast(*flat: torch.Tensor) -> Sequence[torch.Tensor]:
        brought = [t.to(dtype) if t.dtype == torch.float32 else t for t in flat]
        if channels_last:
            brought = [
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for t in brought
            ]
        return call(*brought)

    plain = dtype == torch.float32 and not channels_last
    return Prepared(call if plain else cast, (*module.parameters(), *module.buffers()))


@contextmanager
def conditions(plan: Plan, threads: int, *, building: bool = False) -> Iterator[None]:
    """No gradients, the plan's threads, TF32 flags and autocast; all put back at the end.

    Args:
        plan: The plan.
        threads: CPU threads, at least one.
        building: Leave out inference mode, which marks the tensors that a build keeps.
    """
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad() if building else torch.inference_mode(), _gpu(plan), _autocast(plan):
            yield
    finally:
        if before != threads:
            torch.set_num_threads(before)


def _autocast(plan: Plan) -> AbstractContextManager[object]:
    if not plan.options.get("autocast"):
        return nullcontext()
    return torch.autocast(plan.device.partition(":")[0], dtype=DTYPES[plan.precision])


@contextmanager
def _gpu(plan: Plan) -> Iterator[None]:
    """The plan's GPU, and TF32 exactly where it asks for it: in convolutions it is torch's default.

    cuDNN measures its algorithms once per shape.
    """
    if not plan.device.startswith("cuda"):
        yield
        return
    wanted = plan.precision == "tf32"
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, conv.allow_tf32, conv.benchmark)
    matmul.allow_tf32, conv.allow_tf32, conv.benchmark = wanted, wanted, True
    try:
        with torch.cuda.device(plan.device):
            yield
    finally:
        matmul.allow_tf32, conv.allow_tf32, conv.benchmark = before


def need_compiler(plan: Plan) -> None:
    """Make sure that what Inductor generates for the plan's device can be compiled here.

    Raises:
        MissingBackendError: Its compiler is absent: g++ or `CXX`, on a GPU Triton too.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError):
        raise MissingBackendError("a C++ compiler", COMPILER_INSTALL) from None
    if plan.device.startswith("cuda") and not present("triton"):
        raise MissingBackendError("triton", "pip install triton")


def threads_of(plan: Plan) -> int:
    """CPU threads of one stream."""
    return plan.threads or max(1, usable_cores() // plan.streams)


def fixed_batch(signature: Signature, plan: Plan) -> int:
    """The batch size that a compiled plan is made for; 0 where none stands out."""
    if not signature.dynamic:
        return signature.max_batch
    return plan.sub_batch or int(plan.options.get("static_batch", 0))


_INDUCTOR_CACHE = threading.Lock()


def use_inductor_cache() -> None:
    """Keep what Inductor compiles where the user's other caches are, not in a shared /tmp."""
    with _INDUCTOR_CACHE:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else -id(tensor)


def _layer_times(profile: torch.profiler.profile, device: str) -> list[LayerTime]:
    events = []
    for event in profile.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if device == "cuda":
            microseconds = event.self_device_time_total if on_device else 0.0
        else:
            microseconds = event.self_cpu_time_total
        if microseconds > 0 and not _is_frame(event.key):
            kind = event.key.partition("::")[0] if "::" in event.key else "kernel"
            per_call = microseconds / 1000 / _PROFILED_CALLS
            events.append(LayerTime(name=event.key, kind=kind, time_ms=per_call))
    return sorted(events, key=lambda layer: -layer.time_ms)


def _is_frame(name: str) -> bool:
    """Whether a profiler entry is a frame around operators and not work of the model."""
    frames = (
        "ProfilerStep",
        "Torch-Compiled",
        "TorchDynamo",
        "Pregraph",
        "AOTDispatcher",
        "## Call",
    )
    return name.startswith(frames)
