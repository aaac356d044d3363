"""OpenVINO on the CPU: fp32, bf16 and calibrated int8.

fp16 is not offered: OpenVINO runs it on processors with AVX512-FP16, but the matrix units (AMX)
take bf16 and int8 only. ResNet-50 took 38.8 ms in fp16, 25.9 ms in fp32 and 5.5 ms in bf16 (one
image, two cores).
"""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.base.errors import SuanliError
from suanli.base.plan import BackendSpec, Plan
from suanli.devices.cpu_facts import usable_cores
from suanli.engines.backend import BuildNote, Judge, LayerTime, Runner
from suanli.engines.backends._pieces import (
    arrays_of,
    batch_of,
    check_split,
    fresh_outputs,
    pieces,
)
from suanli.engines.openvino_graph import (
    GRAPH,
    INSTALL,
    WEIGHTS,
    mark_float,
    matching,
    openvino,
    operator_names,
    program_graph,
    source_of,
)

if TYPE_CHECKING:
    import torch

    from suanli.base.signature import Signature, TensorSpec
    from suanli.engines.program import Program

_KINDS = {"fp32": "f32", "bf16": "bf16"}
_NAMES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}


def configuration(plan: Plan, *, streams: int, ov: Any) -> dict[str, Any]:
    """OpenVINO's properties for a plan.

    Threads are not pinned: pinning gave ResNet-50 and BERT nothing measurable on a free machine,
    and it makes two processes that share one wait for the same core. Sizes of dynamic quantisation
    and of the key-value cache are set because their defaults change values.

    Raises:
        SuanliError: The plan's precision is not one of this backend, or not one of this CPU.
    """
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = plan.precision
    if plan.quantized:
        if plan.quantization is not None and plan.quantization.scheme != "int8-static":
            raise SuanliError(f"openvino does not offer {plan.quantization.scheme}")
        precision = "fp32" if plan.options.get("rest") == "fp32" else "bf16"
        if "BF16" not in capabilities:
            precision = "fp32"
    if precision not in _KINDS:
        raise SuanliError(f"openvino does not offer {precision} on the CPU")
    if precision == "bf16" and "BF16" not in capabilities:
        raise SuanliError("this CPU has no bf16 instructions")
    threads = plan.threads * plan.streams or usable_cores()
    return {
        "INFERENCE_PRECISION_HINT": _KINDS[precision],
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }


class OpenVinoBackend:
    """Builds IR files and runs them with infer requests.

    Options of int8 plans: `max_error` is the output error above which operators are put back (see
    `build_int8`); `rest` is what the others run in, "bf16" where the CPU has it, or "fp32". The
    search does not try `rest`: it made 4 % of difference at most (BERT-base, either way).
    """

    spec = BackendSpec(
        name="openvino",
        install=INSTALL,
        packages=("openvino",),
        devices=("cpu",),
        precisions={"cpu": ("fp32", "bf16")},
        quantizations={"cpu": ("int8-static",)},
        options={"max_error": (0.1, 0.03)},
        option_needs={"max_error": ("int8-static",)},
        build_s=8.0,
        promise={"fp32": 0.5, "bf16": 0.12, "int8-static": 0.08},
        streams=True,
    )

    def build(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None" = None,
    ) -> BuildNote:
        """Write model.xml and model.bin; see `Backend.build`."""
        return self._build(program, plan, folder, calibration, None)

    def build_judged(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None",
        judge: Judge,
    ) -> BuildNote:
        """The same, with `judge` in place of the output error; see `JudgedBackend.build_judged`."""
        return self._build(program, plan, folder, calibration, judge)

    def _build(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None",
        judge: Judge | None,
    ) -> BuildNote:
        check_split(program.signature, plan)
        configuration(plan, streams=plan.streams, ov=openvino())
        if plan.quantized:
            from suanli.engines.quantize import build_int8

            return build_int8(program, plan, folder, calibration, judge)
        source = program_graph(program)
        model = openvino().Core().read_model(source)
        names = matching(operator_names(model), plan.float_operators)
        shutil.copyfile(source, folder / GRAPH)
        shutil.copyfile(source.with_name(WEIGHTS), folder / WEIGHTS)
        if names:
            mark_float(folder / GRAPH, names)
        return BuildNote(plan=plan, details={"graph": source_of(model)})

    def load(self, program: "Program", plan: Plan, folder: Path) -> Runner:
        """Open the IR; graphs compile on the first call that needs them."""
        return _Runner(program.signature, plan, folder / GRAPH)


class _Graph:
    """One compiled graph with its infer requests."""

    def __init__(self, ov: Any, compiled: Any, order: Sequence[int], requests: int) -> None:
        self._ov = ov
        self._order = order  # position in the signature of each input of the graph
        self.requests = [compiled.create_infer_request() for _ in range(requests)]

    def bind(
        self, request: Any, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> None:
        """Point a request at memory that it reads from and writes to without a copy."""
        for index, position in enumerate(self._order):
            tensor = self._ov.Tensor(inputs[position], shared_memory=True)
            request.set_input_tensor(index, tensor)
        for index, array in enumerate(outputs):
            request.set_output_tensor(index, self._ov.Tensor(array, shared_memory=True))

    def run_whole(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Run a call that is one piece."""
        self.bind(self.requests[0], inputs, outputs)
        self.requests[0].infer()

    def run(self, calls: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]) -> None:
        """Run the pieces of a batch, as many at once as there are requests."""
        try:
            for number, (inputs, outputs) in enumerate(calls):
                request = self.requests[number % len(self.requests)]
                if number >= len(self.requests):
                    request.wait()
                self.bind(request, inputs, outputs)
                request.start_async()
        finally:
            # also after an error: a request may not outlive the memory it writes to
            for request in self.requests[: len(calls)]:
                request.wait()


class _Runner:
    """Answers any batch.

    A piece of one sample, or of the plan's sub-batch, gets a graph of that size: for networks of a
    tenth of a millisecond a free batch costs a tenth more. All other sizes share one graph with a
    free batch. A call that is one piece runs as one stream on all the plan's threads.
    """

    concurrent = True  # by a lock of its own

    def __init__(self, signature: "Signature", plan: Plan, xml: Path) -> None:
        self._ov = openvino()
        self._signature, self._plan = signature, plan
        self._core = self._ov.Core()
        self._model = self._core.read_model(xml)
        positions = {spec.name: i for i, spec in enumerate(signature.inputs)}
        self._order = [positions[port.get_any_name()] for port in self._model.inputs]
        self._shapes = [_shape_of(port) for port in self._model.outputs]
        self._types = [_torch_type(port.get_element_type()) for port in self._model.outputs]
        self._wanted = [_signature_type(spec) for spec in signature.outputs]
        self._sized_late = any(-1 in shape[1:] for shape in self._shapes)
        self._converts = self._types != self._wanted
        self._cuts = plan.streams > 1 or plan.sub_batch > 0
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._counting: Any = None
        # requests and their memory belong to one call at a time
        self._lock = threading.Lock()

    def __call__(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        arrays = arrays_of(inputs)
        batch = batch_of(self._signature, inputs)
        with self._lock:
            if self._sized_late:
                return self._copied(arrays, batch)
            outputs = fresh_outputs(self._shapes, self._types, batch)
            targets = [tensor.numpy() for tensor in outputs]
            cuts = pieces(batch, self._plan.streams, self._plan.sub_batch) if self._cuts else []
            if len(cuts) <= 1:
                self._graph(batch, 1).run_whole(arrays, targets)
            else:
                calls = [self._piece(arrays, targets, *bounds) for bounds in cuts]
                sizes = {stop - start for start, stop in cuts}
                size = sizes.pop() if len(sizes) == 1 else 0
                self._graph(size, self._plan.streams).run(calls)
        if not self._converts:
            return outputs
        return [
            tensor if tensor.dtype == wanted else tensor.to(wanted)
            for tensor, wanted in zip(outputs, self._wanted, strict=True)
        ]

    def layer_times(self, inputs: "Sequence[torch.Tensor]") -> list[LayerTime]:
        """Times by OpenVINO's own counters, in a graph compiled for it (one stream)."""
        arrays = arrays_of(inputs)
        with self._lock:
            if self._counting is None:
                config = configuration(self._plan, streams=1, ov=self._ov)
                self._counting = self._core.compile_model(
                    self._model, "CPU", config | {"PERF_COUNT": True}
                )
            request = self._counting.create_infer_request()
            for _ in range(2):  # the first call at a shape also makes its kernels
                request.infer([arrays[position] for position in self._order])
            return _layers(self._ov, self._counting, request, self._model)

    def close(self) -> None:
        """Give back the compiled graphs."""
        with self._lock:
            self._graphs.clear()
            self._counting = None

    def _piece(
        self, arrays: Sequence[np.ndarray], targets: Sequence[np.ndarray], start: int, stop: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        specs = self._signature.inputs
        part = [
            array[start:stop] if spec.batched else array
            for array, spec in zip(arrays, specs, strict=True)
        ]
        return part, [target[start:stop] for target in targets]

    def _graph(self, size: int, streams: int) -> _Graph:
        """The graph for pieces of `size` samples; compiled on first use."""
        own = self._signature.dynamic and size and size in (1, self._plan.sub_batch)
        key = (size if own else 0, streams)
        if key not in self._graphs:
            model = self._model
            if own:
                model = model.clone()
                model.reshape(self._sized(model, size))
            config = configuration(self._plan, streams=streams, ov=self._ov)
            compiled = self._core.compile_model(model, "CPU", config)
            self._graphs[key] = _Graph(self._ov, compiled, self._order, streams)
        return self._graphs[key]

    def _sized(self, model: Any, size: int) -> dict[Any, list[int]]:
        shapes = {}
        for port, position in zip(model.inputs, self._order, strict=True):
            spec = self._signature.inputs[position]
            shapes[port] = [size if n == -1 else n for n in spec.shape]
        return shapes

    def _copied(self, arrays: Sequence[np.ndarray], batch: int) -> "list[torch.Tensor]":
        """One call whose outputs' sizes are only known after it."""
        import torch

        request = self._graph(batch, 1).requests[0]
        results = request.infer([arrays[position] for position in self._order])
        return [
            torch.from_numpy(np.array(array)).to(wanted)
            for array, wanted in zip(results.to_tuple(), self._wanted, strict=True)
        ]


def _shape_of(port: Any) -> list[int]:
    shape = port.get_partial_shape()
    return [size.get_length() if size.is_static else -1 for size in shape]


def _torch_type(element_type: Any) -> "torch.dtype":
    import torch

    return torch.from_numpy(np.empty(0, dtype=element_type.to_dtype())).dtype


def _signature_type(spec: "TensorSpec") -> "torch.dtype":
    import torch

    found = getattr(torch, spec.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _layers(ov: Any, compiled: Any, request: Any, model: Any) -> list[LayerTime]:
    known = set(operator_names(model))
    facts = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        names = info["originalLayersNames"].astype(str).split(",")
        # a quantiser is called after the operator whose result it rounds
        plain = dict.fromkeys(name.partition("/fq_")[0] for name in names)
        origin = tuple(name for name in plain if name in known)
        facts[node.get_friendly_name()] = (info["runtimePrecision"].astype(str), origin)
    found = []
    for layer in request.get_profiling_info():
        if layer.status != ov.ProfilingInfo.Status.EXECUTED:
            continue
        precision, origin = facts.get(layer.node_name, ("", ()))
        found.append(
            LayerTime(
                name=layer.node_name,
                kind=layer.node_type,
                time_ms=layer.real_time.total_seconds() * 1e3,
                precision=_NAMES.get(precision, precision),
                origin=origin,
            )
        )
    return found


BACKEND = OpenVinoBackend()
